"use strict";
// Two models, or the checkpoints of a run, beside each other.

const loadAt = (point, name) => point.routers[name].load;

// Two models: a table, before and after.
function beforeAndAfter([before, after], routers) {
  const both = (name, field, digits) => `${before.routers[name][field].toFixed(digits)} → ${after.routers[name][field].toFixed(digits)}`;
  const rows = routers.map((name) => [
    name,
    both(name, "max_over_mean", 2),
    both(name, "entropy", 2),
    both(name, "confidence", 2),
    both(name, "dead", 0),
    percent(after.drift[name].churn),
    number(after.drift[name].total_variation, 3),
  ]);
  return table(["router", "max/mean", "entropy", "confidence", "dead", "churn", "total variation"], rows);
}

// More: a line for each router, a picture for each figure.
function courses(points, routers) {
  const names = points.map(({ name }) => name);
  const figure = (caption, field, upward) =>
    lines(caption, names, routers.map((name) => ({ name, values: points.map((point) => point.routers[name][field]) })), { across: "", upward });
  const drift = (caption, field) =>
    lines(caption, names.slice(1), routers.map((name) => ({ name, values: points.slice(1).map((point) => point.drift[name][field]) })), { across: "", upward: "share" });
  return element(
    "div",
    { class: "grid" },
    figure("Max over mean of the load.", "max_over_mean", "max / mean"),
    figure("Entropy of a token's probabilities.", "entropy", "nats"),
    figure("Confidence.", "confidence", "probability"),
    figure("Dead choices.", "dead", "choices"),
    drift("Churn since the point before.", "churn"),
    drift("Total variation of the load since the point before.", "total_variation"),
  );
}

function comparison() {
  if (!stats.compare) return;
  const { points, tokens } = stats.compare;
  const routers = Object.keys(points[0].routers);
  const widest = Math.max(...routers.map((name) => loadAt(points[0], name).length));
  let shown = points.length - 1;
  const relative = (name) => loadAt(points[shown], name).map((share, _, { length }) => share * length);
  const caption = () => `Load of ${points[shown].name}, over the fair share: 1 is even (at most 3 is shown).`;
  const picture = plot(caption(), Math.max(200, 110 + 22 * routers.length), (colours) => ({
    traces: [
      {
        type: "heatmap",
        z: routers.map((name) => [...relative(name), ...Array(widest - relative(name).length).fill(null)]),
        x: range(widest).map(String),
        y: routers,
        zmin: 0,
        zmax: 3,
        colorscale: [[0, colours.low], [1 / 3, colours.middle], [1, colours.high]],
        colorbar: { thickness: 10, outlinewidth: 0 },
        hovertemplate: "router %{y}, choice %{x}: %{z:.2f}<extra></extra>",
      },
    ],
    layout: { xaxis: { type: "category", title: { text: "choice" }, showgrid: false }, yaxis: { type: "category", autorange: "reversed", showgrid: false } },
  }));
  const label = element("output", { for: "checkpoint" }, points[shown].name);
  const slider = element("input", {
    type: "range",
    id: "checkpoint",
    min: 0,
    max: points.length - 1,
    value: shown,
    oninput: () => {
      shown = Number(slider.value);
      label.textContent = points[shown].name;
      picture.firstChild.textContent = caption();
      drawn.get(picture.lastChild)();
    },
  });
  const pair = points.length === 2;
  const row = control(pair ? "Model" : "Checkpoint", slider);
  row.append(label);
  section(
    "history",
    pair ? "Two models" : "Checkpoints beside each other",
    element(
      "p",
      { class: "quiet" },
      `The same ${count(tokens)} tokens in all. Churn: tokens whose best choice is another than ${pair ? `with ${points[0].name}` : "at the point before"}. ` +
        "Total variation: half the sum of the loads' differences. Between models that were trained apart both say nothing: " +
        "their choices share numbers, not tasks.",
    ),
    pair ? beforeAndAfter(points, routers) : courses(points, routers),
    row,
    picture,
  );
}
