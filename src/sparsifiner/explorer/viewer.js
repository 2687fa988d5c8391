// Clicks on pictures choose a patch, clicks on the matrix a layer and head; arrow keys move the patch; an image dropped
// anywhere is opened as if it were chosen with the button.
element.tabIndex = 0;
element.setAttribute("role", "application");
element.setAttribute("aria-label", "Pictures of one query patch. Arrow keys move it; with Shift by four patches.");

const panels = () => element.querySelector(".panels");
const within = (value, count) => Math.min(Math.max(value, 0), count - 1);

function choose(row, column) {
  const found = panels();
  const rows = Number(found.dataset.rows), columns = Number(found.dataset.columns);
  row = within(row, rows);
  column = within(column, columns);
  found.dataset.row = row;
  found.dataset.column = column;
  for (const mark of element.querySelectorAll(".query")) {  // at once; the pictures follow
    mark.style.top = `${(100 * row) / rows}%`;
    mark.style.left = `${(100 * column) / columns}%`;
  }
  trigger("select", { row, column });
}

element.addEventListener("click", (event) => {
  const cell = event.target.closest("[data-layer]");
  if (cell) {
    trigger("apply", { layer: Number(cell.dataset.layer), head: Number(cell.dataset.head) });
    return;
  }
  const picture = event.target.closest(".picture:not(.matrix)");
  if (!picture || !panels()) return;
  const box = picture.getBoundingClientRect();
  const row = Math.floor(((event.clientY - box.top) / box.height) * Number(panels().dataset.rows));
  const column = Math.floor(((event.clientX - box.left) / box.width) * Number(panels().dataset.columns));
  choose(row, column);
});

element.addEventListener("keydown", (event) => {
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const move = moves[event.key];
  if (!move || event.altKey || event.ctrlKey || event.metaKey || !panels()) return;
  event.preventDefault();
  const steps = event.shiftKey ? 4 : 1;
  choose(Number(panels().dataset.row) + steps * move[0], Number(panels().dataset.column) + steps * move[1]);
});

document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  const input = document.querySelector("input[type=file]");
  if (!input || !event.dataTransfer.files.length) return;
  input.files = event.dataTransfer.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
});
