"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id)?.textContent || "null");
  const figures = read("figures") || {};
  const tensors = read("tensors") || [];
  const pickers = [...document.querySelectorAll("select[data-chart]")];
  const narrow = window.matchMedia("(max-width: 760px)");
  const paper = window.matchMedia("print");
  const mouse = window.matchMedia("(hover: hover)");

  // Figures name colours by CSS variable, so that one style sheet decides light, dark and print.
  const coloured = (value, css) => {
    if (typeof value === "string") {
      return value.startsWith("var(--") ? css.getPropertyValue(value.slice(4, -1)).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => coloured(item, css));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, coloured(item, css)]));
  };

  const axis = (given, css) => ({
    gridcolor: css.getPropertyValue("--line").trim(),
    linecolor: css.getPropertyValue("--line").trim(),
    zerolinecolor: css.getPropertyValue("--line").trim(),
    automargin: true,
    ...given,
    title: { standoff: 8, font: { size: 13 }, ...(given.title || {}) },
  });

  const paint = (place, figure) => {
    const css = getComputedStyle(document.documentElement);
    const made = coloured(figure, css);
    const layout = {
      margin: { t: 30, r: 10, b: 46, l: 54 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: css.getPropertyValue("--ink").trim() },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      hoverlabel: { align: "left", bgcolor: css.getPropertyValue("--panel").trim(), font: { color: css.getPropertyValue("--ink").trim() } },
      autosize: true,
      // on a touch screen a finger on a chart must scroll the page
      dragmode: mouse.matches && !narrow.matches ? "zoom" : false,
      ...made.layout,
    };
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(key)) layout[key] = axis(layout[key], css);
    }
    return Plotly.react(place, made.data, layout, {
      responsive: true,
      displaylogo: false,
      displayModeBar: mouse.matches && !narrow.matches ? "hover" : false,
      // named one by one: among the defaults is one that uploads the chart to a web service
      modeBarButtons: [["toImage", "resetScale2d"]],
    });
  };

  // Values inside the range in one colour, those it cuts off in another. Logarithmic, because what is cut off
  // is a thousandth of the rest.
  const histogram = ({ edges, counts, range, inside, axis: title }) => {
    const most = Math.max(...counts, 1);
    const short = (x) => Number(x.toPrecision(3)).toString().replace("-", "−");
    const mark = (x) => ({
      x, y: 1, yref: "paper", xanchor: "center", yanchor: "bottom", text: short(x), showarrow: false, font: { color: "var(--ink)" },
    });
    const line = (x) => ({
      type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: { color: "var(--ink)", width: 1.5, dash: "dash" },
    });
    return {
      data: [{
        type: "bar",
        x: counts.map((_, i) => (edges[i] + edges[i + 1]) / 2),
        width: counts.map((_, i) => edges[i + 1] - edges[i]),
        y: counts,
        marker: { color: counts.map((_, i) => (i < inside[0] || i > inside[1] ? "var(--bad)" : "var(--runtime)")), line: { width: 0 } },
        hovertext: counts.map((n, i) => `${n.toLocaleString("en")} values from ${short(edges[i])} to ${short(edges[i + 1])}` +
          (i < inside[0] || i > inside[1] ? ", clipped" : "")),
        hoverinfo: "text",
      }],
      layout: {
        height: 280,
        bargap: 0,
        showlegend: false,
        margin: { t: 26, r: 14, b: 46, l: 60 },
        xaxis: { title: { text: title }, exponentformat: "power" },
        yaxis: {
          type: "log", range: [Math.log10(0.6), Math.log10(most * 1.8)], title: { text: "values" },
          dtick: Math.max(1, Math.ceil(Math.log10(most) / 5)), exponentformat: "power",
        },
        shapes: [
          { type: "rect", x0: range[0], x1: range[1], y0: 0, y1: 1, yref: "paper", fillcolor: "var(--range)", line: { width: 0 }, layer: "below" },
          line(range[0]), line(range[1]),
        ],
        annotations: range.map(mark),
      },
    };
  };

  const pick = (select) => {
    const tensor = tensors[Number(select.value)];
    const place = document.getElementById(select.dataset.chart);
    document.getElementById(select.dataset.text).textContent = `${tensor.text}.`;
    place.setAttribute("aria-label", `Histogram: ${tensor.text}`);
    return paint(place, histogram(tensor));
  };

  const draw = () => {
    for (const [id, figure] of Object.entries(figures)) paint(document.getElementById(id), figure);
    for (const select of pickers) pick(select);
  };

  for (const select of pickers) select.addEventListener("change", () => pick(select));
  for (const button of document.querySelectorAll("button[data-tensor]")) {
    button.addEventListener("click", () => {
      const select = pickers.find((one) => [...one.options].some((o) => o.value === button.dataset.tensor));
      select.value = button.dataset.tensor;
      pick(select);
      select.focus();
    });
  }
  draw();
  // charts have moved what a link to a section led to
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView({ behavior: "instant" });
  for (const query of [window.matchMedia("(prefers-color-scheme: dark)"), paper, narrow]) {
    query.addEventListener("change", draw);
  }
  document.documentElement.dataset.charts = "drawn";
})();
