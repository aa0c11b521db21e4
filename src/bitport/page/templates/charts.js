"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const narrow = window.matchMedia("(max-width: 760px)");
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
    title: { standoff: 8, ...(given.title || {}) },
  });

  const draw = () => {
    const css = getComputedStyle(document.documentElement);
    for (const [id, figure] of Object.entries(figures)) {
      const place = document.getElementById(id);
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
      Plotly.react(place, made.data, layout, {
        responsive: true,
        displaylogo: false,
        displayModeBar: mouse.matches && !narrow.matches ? "hover" : false,
        modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
      });
    }
  };

  draw();
  for (const query of [window.matchMedia("(prefers-color-scheme: dark)"), window.matchMedia("print"), narrow]) {
    query.addEventListener("change", draw);
  }
  document.documentElement.dataset.charts = "drawn";
})();
