"use strict";
// A cell of the matrix shows its crops; fields filter them, confidence orders them. Without this
// script all crops stand on the page in their sections.
(() => {
  const browser = document.getElementById("browser");
  const form = browser.querySelector("form");
  const all = [...document.querySelectorAll(".crops li")];
  const cells = [...document.querySelectorAll("#matrix td[data-true]")];
  document.querySelectorAll(".js").forEach((element) => { element.hidden = false; });

  const nameOf = (label) => form.elements.true.options[Number(label) + 1].text;
  const fields = [...new Set(all.map((crop) => crop.dataset.field))].sort();
  fields.forEach((field) => form.elements.field.add(new Option(field, field)));

  cells.forEach((cell) => {
    const button = document.createElement("button");
    const words = cell.textContent.trim();
    button.type = "button";
    button.append(...cell.childNodes);
    button.setAttribute("aria-label",
      `${words}: true ${nameOf(cell.dataset.true)}, predicted ${nameOf(cell.dataset.guess)}`);
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => {
      form.reset();
      form.elements.true.value = cell.dataset.true;
      form.elements.guess.value = cell.dataset.guess;
      show();
      const heading = document.getElementById("found");
      heading.focus({ preventScroll: true });
      heading.scrollIntoView();
    });
    cell.append(button);
  });

  function show() {
    const wanted = ["true", "guess", "field"].filter((key) => form.elements[key].value !== "");
    const order = Number(form.elements.order.value);
    const found = all
      .filter((crop) => wanted.every((key) => crop.dataset[key] === form.elements[key].value))
      .sort((a, b) => order * (a.dataset.sure - b.dataset.sure));
    const chosen = wanted.length > 0;
    document.getElementById("selection")
      .replaceChildren(...(chosen ? found : []).map((crop) => crop.cloneNode(true)));
    document.getElementById("count").textContent = chosen
      ? `${found.length} of the crops on this page`
      : "Choose a class or a field here, or a cell of the matrix above.";
    cells.forEach((cell) => {
      const same = cell.dataset.true === form.elements.true.value &&
        cell.dataset.guess === form.elements.guess.value;
      cell.firstChild.setAttribute("aria-pressed", String(same));
    });
  }

  form.addEventListener("change", show);
  form.addEventListener("reset", () => setTimeout(show));
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
})();
