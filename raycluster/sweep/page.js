// A trial under the pointer is lit wherever it appears; a click on the head of a column sorts by it, largest first.
const marks = document.querySelectorAll("[data-trial]");
function light(trial) {
  for (const mark of marks) mark.classList.toggle("lit", mark.dataset.trial === trial);
  for (const svg of document.querySelectorAll("svg")) svg.classList.toggle("dimmed", trial !== null);
}
for (const mark of marks) {
  if (!mark.dataset.trial) continue;
  mark.addEventListener("pointerenter", () => light(mark.dataset.trial));
  mark.addEventListener("pointerleave", () => light(null));
}
document.querySelectorAll("th").forEach((head, column) => {
  let down = false;
  head.addEventListener("click", () => {
    down = !down;
    const body = head.closest("table").tBodies[0];
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const number = row => (value(row).trim() === "" || isNaN(value(row)) ? null : Number(value(row)));
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [number(a), number(b)];
      const order = x === null || y === null ? (x === null) - (y === null) || value(a).localeCompare(value(b)) : x - y;
      return down ? -order : order;
    });
    body.append(...rows);
  });
});
