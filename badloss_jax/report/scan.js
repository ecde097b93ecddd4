"use strict";
// Filters the suspects by class, reason and score, and saves what is ticked. Nothing is sent anywhere.
(() => {
  const { rows, classes, reasons } = JSON.parse(document.getElementById("rows").textContent);
  const ticked = rows.map((row) => row[5] === 1);
  const cards = Array.from(document.querySelectorAll(".card"));
  const element = (id) => document.getElementById(id);

  const matches = (row) => {
    const label = element("class").value, reason = element("reason").value, least = parseFloat(element("score").value);
    return (label === "" || row[1] === Number(label)) && (reason === "" || row[4] === Number(reason)) &&
      !(row[2] < least);
  };
  const shown = () => rows.map((row, i) => i).filter((i) => matches(rows[i]));

  const update = () => {
    const visible = new Set(shown());
    let images = 0;
    for (const card of cards) {
      const row = Number(card.dataset.row);
      card.hidden = !visible.has(row);
      images += card.hidden ? 0 : 1;
      card.querySelector("input").checked = ticked[row];
    }
    const chosen = [...visible].filter((i) => ticked[i]).length;
    element("count").textContent =
      `${visible.size} suspects match, ${images} of them with their image below; ${chosen} are ticked`;
  };
  const save = (name, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/plain;charset=utf-8" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  const quoted = (cell) => {
    const text = /^[=+\-@\t]/.test(cell) && isNaN(cell) ? `./${cell}` : String(cell);
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const chosen = () => shown().filter((i) => ticked[i]).map((i) => rows[i]);

  for (const id of ["class", "reason", "score"]) {
    for (const event of ["input", "change"]) element(id).addEventListener(event, update);
  }
  for (const card of cards) {
    card.querySelector("input").addEventListener("change", (event) => {
      ticked[Number(card.dataset.row)] = event.target.checked;
      update();
    });
  }
  for (const [id, value] of [["all", true], ["none", false]]) {
    element(id).addEventListener("click", () => {
      for (const i of shown()) ticked[i] = value;
      update();
    });
  }
  element("save-list").addEventListener("click", () => save("selection.txt", chosen().map((row) => `${row[0]}\n`).join("")));
  element("save-csv").addEventListener("click", () => {
    const lines = chosen().map((row) => [row[0], classes[row[1]], row[2], row[3], reasons[row[4]]].map(quoted).join(","));
    save("selection.csv", ["path,label,score,p_value,reason", ...lines].join("\n") + "\n");
  });
  update();
})();
