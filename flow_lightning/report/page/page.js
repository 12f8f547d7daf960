"use strict";
// Filters: which cards and rows are shown.
for (const form of document.querySelectorAll(".filter")) {
  const part = document.getElementById(form.dataset.for);
  const [lists, classes] = [form.elements.list, form.elements.class];
  const said = form.querySelector("output");
  const shown = () => [...part.querySelectorAll(".card:not([hidden])")];
  const filter = () => {
    for (const card of part.querySelectorAll(".card")) {
      const isListed = card.dataset.lists.split(" ").includes(lists.value);
      card.hidden = !isListed || (classes.value !== "" && card.dataset.class !== classes.value);
    }
    for (const row of part.querySelectorAll("tr[data-class]")) {
      row.hidden = classes.value !== "" && row.dataset.class !== classes.value;
    }
    said.textContent = `${shown().length} shown`;
  };
  form.addEventListener("change", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.querySelector(".copy").addEventListener("click", async () => {
    const text = shown().map((card) => card.dataset.index).join(", ");
    try {
      await navigator.clipboard.writeText(text);
    } catch { // a file from an attachment may not use the clipboard
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    said.textContent = `Copied: ${text}`;
  });
  filter();
}
// A click on a column's name sorts by it, a second one the other way round.
document.addEventListener("click", (event) => {
  const button = event.target.closest(".sort");
  if (!button) return;
  const head = button.closest("th");
  const isUp = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", isUp ? "ascending" : "descending");
  const value = (row) => row.children[head.cellIndex].textContent;
  const number = (text) => parseFloat(text.replace(/,/g, ""));
  const compare = (a, b) => {
    const [x, y] = [number(a), number(b)];
    if (isNaN(x) || isNaN(y)) return isNaN(x) === isNaN(y) ? a.localeCompare(b) : isNaN(x) - isNaN(y);
    return x - y;
  };
  const body = head.closest("table").tBodies[0];
  body.append(...[...body.rows].sort((a, b) => (isUp ? 1 : -1) * compare(value(a), value(b))));
});
// What a mark means: for mouse, finger and keyboard. The marks have the same text for screen readers.
const tip = document.getElementById("tip");
const show = (event) => {
  const mark = event.target.closest && event.target.closest(".mark, .token");
  tip.hidden = !mark;
  if (!mark) return;
  if (mark.title) { mark.dataset.tip = mark.title; mark.removeAttribute("title"); }
  tip.textContent = mark.dataset.tip || mark.getAttribute("aria-label");
  const box = mark.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${box.top > 60 ? box.top - tip.offsetHeight - 6 : box.bottom + 6}px`;
};
for (const kind of ["pointerover", "focusin", "click"]) document.addEventListener(kind, show);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
