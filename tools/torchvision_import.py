"""Imports torchvision where only its networks are wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def import_torchvision() -> Any:
    """Imports torchvision, also beside a torch that its compiled operators do not fit.

    At import, torchvision describes operators of its compiled part (`torchvision::nms`, …) to
    torch; where torch is another build, that part is not loaded and the description fails. The
    networks use none of them: their descriptions are skipped.

    Raises:
        ImportError: torch or torchvision is not installed.
    """
    import torch

    register_fake = torch.library.register_fake

    def register_fake_of_others(op: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register_fake(op, *args, **kwargs)

    torch.library.register_fake = register_fake_of_others
    try:
        import torchvision
    finally:
        torch.library.register_fake = register_fake
    return torchvision
