"use strict";
// Plotly with this page's colours, in light, dark and print.

const drawn = new Map(); // the plot's element -> what draws it again

// Plotly reads its labels as markup.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function theme() {
  const light = matchMedia("print").matches || !matchMedia("(prefers-color-scheme: dark)").matches;
  return light
    ? { ink: "#1b1f24", line: "#d8dee4", middle: "#f7f7f7", low: "#2166ac", high: "#b2182b", series: "#0b5cad", second: "#c2570c" }
    : { ink: "#e6e9ec", line: "#3a424a", middle: "#22272c", low: "#4393e4", high: "#f4735f", series: "#74b4f4", second: "#f0a35e" };
}

function layoutOf(height, extra) {
  const { ink, line } = theme();
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true, fixedrange: true };
  const { xaxis, yaxis, ...rest } = extra;
  return {
    height,
    margin: { l: 44, r: 12, t: 8, b: 48 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: ink, family: "system-ui, sans-serif", size: 12 },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    dragmode: false,
    ...rest,
    xaxis: { ...axis, ...xaxis },
    yaxis: { ...axis, ...yaxis },
  };
}

// `make(colours)` returns {traces, layout}; called again where colours change.
function plot(caption, height, make) {
  const place = element("div", { class: "plot", role: "img", "aria-label": caption });
  const figure = element("figure", {}, element("figcaption", {}, caption), place);
  const draw = () => {
    const { traces, layout = {} } = make(theme());
    return Plotly.react(place, traces, layoutOf(height, layout), { responsive: true, displayModeBar: false });
  };
  drawn.set(place, draw);
  return figure;
}

// Draw what is in the page; forget what has left it.
async function drawAll() {
  const waiting = [];
  for (const [place, draw] of drawn) {
    if (place.isConnected) waiting.push(draw());
    else drawn.delete(place);
  }
  await Promise.all(waiting);
}

const diverging = ({ low, middle, high }) => [[0, low], [0.5, middle], [1, high]];
const rising = ({ middle, series }) => [[0, middle], [1, series]];

// values[row][column]; rows from the top.
function heatMap(caption, values, { rows, columns, across, down, scale, least, most, unit, text }) {
  const height = Math.max(180, Math.min(560, 110 + 22 * rows.length));
  return plot(caption, height, (colours) => ({
    traces: [
      {
        type: "heatmap",
        z: values,
        x: columns.map(plain),
        y: rows.map(plain),
        zmin: least,
        zmax: most,
        colorscale: scale(colours),
        hovertemplate: `${down} %{y}, ${across} %{x}: %{customdata}<extra></extra>`,
        customdata: text || values.map((row) => row.map((value) => (value === null ? "–" : value.toFixed(3)))),
        colorbar: { thickness: 10, title: { text: unit, side: "right" }, tickfont: { size: 10 }, outlinewidth: 0 },
        xgap: columns.length > 32 ? 0 : 1,
        ygap: rows.length > 32 ? 0 : 1,
      },
    ],
    layout: {
      xaxis: { title: { text: across }, type: "category", showgrid: false },
      yaxis: { autorange: "reversed", type: "category", showgrid: false },
    },
  }));
}

// series: [{name, values}], beside each other at each of `groups`.
function bars(caption, groups, series, { across, upward, format = ".3f", stacked = false }) {
  return plot(caption, 260, ({ series: first, second, line }) => ({
    traces: series.map(({ name, values }, index) => ({
      type: "bar",
      name,
      x: groups.map(plain),
      y: values,
      marker: { color: [first, second, line][index % 3] },
      hovertemplate: `%{x}: %{y:${format}}<extra>${plain(name)}</extra>`,
    })),
    layout: {
      barmode: stacked ? "stack" : "group",
      bargap: 0.15,
      showlegend: series.length > 1,
      xaxis: { title: { text: across }, type: "category" },
      yaxis: { title: { text: upward }, rangemode: "tozero" },
    },
  }));
}

// series: [{name, values}] over `points`.
function lines(caption, points, series, { across, upward, height = 240, mark = null }) {
  return plot(caption, height, ({ ink }) => ({
    traces: series.map(({ name, values }) => ({
      type: "scatter",
      mode: "lines+markers",
      name,
      x: points.map(plain),
      y: values,
      hovertemplate: `%{x}: %{y:.3f}<extra>${plain(name)}</extra>`,
    })),
    layout: {
      showlegend: series.length > 1 && series.length <= 8,
      xaxis: { title: { text: across }, type: "category" },
      yaxis: { title: { text: upward }, rangemode: "tozero" },
      shapes: mark === null ? [] : [{ type: "line", x0: mark(), x1: mark(), y0: 0, y1: 1, yref: "paper", line: { color: ink, dash: "dot" } }],
    },
  }));
}
