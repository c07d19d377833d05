"""A study and its page, which tests of the report share."""

from pathlib import Path

import pytest

from jaxcells.evaluation.report import Study, write_report
from tests.evaluation.studies import make_study


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def study(images) -> Study:
    return make_study(images)


@pytest.fixture(scope="module")
def page(study, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, study)
    return path
