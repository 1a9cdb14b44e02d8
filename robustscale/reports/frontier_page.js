"use strict";
(function () {
  const byId = (id) => document.getElementById(id);
  const figures = JSON.parse(byId("figures").textContent);
  // Without the last two a button would upload the chart.
  const config = {responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"],
    showSendToCloud: false, plotlyServerURL: ""};
  for (const [id, figure] of Object.entries(figures)) Plotly.newPlot(id, figure.data, figure.layout, config);

  const points = Array.from(document.querySelectorAll("tbody.point"));
  const plot = figures.frontier && byId("frontier");
  const needed = byId("needed"), sure = byId("sure"), answer = byId("answer"), all = byId("all");

  function open(point, wanted) {
    point.classList.toggle("open", wanted);
    point.querySelector(".opener").setAttribute("aria-expanded", point.classList.contains("open"));
  }

  // The line stands where robustness is asked for, the ring around the point that was chosen.
  function mark(point, target) {
    if (!plot) return;
    const at = point ? {x: [[+point.dataset.ra]], y: [[+point.dataset.sa]]} : {x: [[]], y: [[]]};
    Plotly.restyle(plot, at, [figures.frontier.data.length - 1]);
    const line = {type: "line", x0: target, x1: target, yref: "paper", y0: 0, y1: 1, line: {dash: "dash", width: 1.5}};
    Plotly.relayout(plot, {shapes: target === null ? [] : [line]});
  }

  function choose(point, target) {
    for (const other of points) if (other !== point) { other.classList.remove("chosen"); open(other, false); }
    if (point) { point.classList.add("chosen"); open(point, true); }
    if (point && point.classList.contains("hideable")) { all.checked = true; showAll(); }
    mark(point, target);
  }

  function showAll() { byId("points").classList.toggle("all", all.checked); }

  // Compared as shown, with one decimal: who reads 40.0 and asks for 40 gets it.
  function reach() {
    const text = needed.value.trim(), target = Number(text), key = sure.checked ? "raLow" : "ra";
    if (text === "" || !Number.isFinite(target)) { choose(null, null); answer.textContent = ""; return; }
    const enough = points.filter((p) => +p.dataset[key] >= target);
    const better = (a, b) => +b.dataset.sa - +a.dataset.sa || +b.dataset.ra - +a.dataset.ra;
    const best = enough.sort(better)[0] || null;
    choose(best, target);
    const most = Math.max(...points.map((p) => +p.dataset[key])).toFixed(1);
    answer.textContent = best
      ? best.dataset.name + ": RA " + best.dataset.ra + " %, SA " + best.dataset.sa + " % on held-out images; " +
        (best.dataset.test ? best.dataset.test + " on the test set" : "not judged on the test set")
      : "No point reaches an RA of " + text + " %" + (sure.checked ? " with its whole interval" : "") + "; the most is " + most + " %.";
  }

  async function copy(button) {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch (refused) {  // A page from a file may have no clipboard: the old way needs a selection.
      getSelection().selectAllChildren(code);
      if (!document.execCommand("copy")) { button.textContent = "press Ctrl+C"; return; }
    }
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  }

  for (const point of points) {
    point.rows[0].addEventListener("click", () => {
      const opened = point.classList.contains("open");
      choose(opened ? null : point, null);
    });
  }
  for (const button of document.querySelectorAll(".command button")) button.addEventListener("click", () => copy(button));
  if (needed) {
    for (const input of [needed, sure]) input.addEventListener("input", reach);
    if (all) all.addEventListener("input", showAll);
    const preset = new URLSearchParams(location.hash.slice(1) || location.search).get("ra");
    if (preset !== null) { needed.value = preset; reach(); }
  }
  if (plot) {
    plot.on("plotly_click", (event) => {
      const point = points.find((p) => p.dataset.name === event.points[0].customdata);
      if (!point) return;
      choose(point, null);
      point.scrollIntoView({behavior: "smooth", block: "center"});
    });
  }
})();
