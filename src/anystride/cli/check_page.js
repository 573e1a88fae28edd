"use strict";
// What a cell's calls came to, in a dialogue; a filter by verdict; everything unfolded for the printer.
// The page says all of it without this script too, except what was right.
{
  const data = JSON.parse(document.getElementById("findings").textContent);
  const dialog = document.getElementById("calls");
  const body = dialog.querySelector("div");

  const element = (tag, text, classes) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (classes) made.className = classes;
    return made;
  };

  const show = (kernel, probe, layout) => {
    body.replaceChildren();
    const title = element("h2", `${data.kernels[kernel].title}: ${probe || layout}`);
    title.id = "calls-title";
    body.append(title);
    for (const [theirs, its, where, verdict, message, place, numbers] of data.kernels[kernel].findings) {
      if (probe ? theirs !== probe : theirs || its !== layout) continue;
      const group = element("div", undefined, "group");
      group.append(element("span", verdict, `verdict ${verdict}`), " ", `${where} in ${its}`);
      if (data.texts[message]) group.append(element("div", data.texts[message], "message"));
      if (place) group.append(element("div", place, "where"));
      if (numbers) group.append(element("div", numbers, "quiet"));
      body.append(group);
    }
    dialog.showModal();
  };

  document.addEventListener("click", (event) => {
    const button = event.target.closest(".cells button");
    if (button) {
      const row = button.closest("tr").dataset;
      show(Number(button.dataset.kernel), row.probe || "", row.layout || "");
    } else if (event.target === dialog || event.target.closest("dialog .close")) {
      dialog.close();
    }
  });

  const filter = document.querySelector(".filter");
  const apply = () => {
    const wanted = new Set([...filter.querySelectorAll("input:checked")].map((input) => input.value));
    const all = wanted.size === filter.querySelectorAll("input").length;
    for (const row of document.querySelectorAll(".cells tbody tr:not(.family)")) {
      let shown = all;
      for (const cell of row.querySelectorAll("td")) {
        const has = (cell.dataset.verdicts || "").split(" ").some((verdict) => wanted.has(verdict));
        cell.classList.toggle("faded", !all && !has);
        shown ||= has;
      }
      row.hidden = !shown;
    }
  };
  filter.addEventListener("change", apply);
  apply();

  window.addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
  document.documentElement.dataset.ready = "yes";
}
