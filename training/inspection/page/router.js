"use strict";
// One router at a time: who takes what, how sure it is, which choices are alike; and text coloured by its choices.

const GROUPINGS = {
  word_part: "part of word",
  position: "position in the sequence",
  sequence_length: "length of the sequence",
  characters: "characters",
  script: "script",
};

function takes(router, grouping, { groups, tokens, share }) {
  const lift = share.map((row) => row.map((value, choice) => (router.load[choice] ? value / router.load[choice] : null)));
  return heatMap(
    `Who takes what by ${GROUPINGS[grouping] || grouping}: share of a group over the choice's share of everything; 1 is as ever.`,
    lift,
    {
      rows: groups,
      columns: range(router.choices),
      across: "choice",
      down: "",
      scale: diverging,
      least: 0,
      most: 2,
      unit: "lift",
      text: share.map((row, group) => row.map((value) => `${percent(value)} of ${count(tokens[group])} tokens`)),
    },
  );
}

function square(caption, values, unit, least) {
  const choices = range(values.length);
  const scale = least < 0 ? diverging : rising;
  return heatMap(caption, values, { rows: choices, columns: choices, across: "choice", down: "choice", scale, least, most: 1, unit });
}

function histogram(caption, { counts }) {
  const edges = counts.map((_, bin) => (bin / counts.length).toFixed(2));
  const total = Math.max(1, sum(counts));
  return bars(caption, edges, [{ name: "tokens", values: counts.map((tokens) => tokens / total) }], {
    across: "from",
    upward: "share of tokens",
  });
}

function typical(router) {
  const chips = (tokens) =>
    tokens.length
      ? element(
          "span",
          {},
          ...tokens.map(({ token, count: taken, of, lift }) =>
            element("span", { class: "chip", title: `takes ${taken} of ${of}` }, token, " ", element("small", {}, `×${lift.toFixed(1)}`)),
          ),
        )
      : element("span", { class: "quiet" }, "nothing more often than everything else");
  const rows = router.typical.map((tokens, choice) => [
    element("span", { class: "chip", style: `background:${shade(choice)}` }, String(choice)),
    percent(router.load[choice]),
    percent(router.first[choice]),
    percent(router.probability[choice]),
    number(router.gate[choice]),
    { text: chips(tokens), words: true },
  ]);
  return element(
    "div",
    {},
    element("h3", {}, "Typical tokens"),
    element("p", { class: "quiet" }, "By how much more often a choice takes them than it takes tokens in general; only what a sample of this size can tell."),
    table(["choice", "load", "best choice of", "probability", "gate", "typical tokens"], rows),
  );
}

function inContext({ context }) {
  if (context === null) return element("p", { class: "quiet" }, "No token is frequent enough to tell whether context changes its choices.");
  const rows = context.words.map(({ token, count: times, agreement, choices }) => [
    element("span", { class: "chip" }, token),
    count(times),
    percent(agreement, 0),
    choices.map(([choice, share]) => `${choice}: ${percent(share, 0)}`).join(", "),
  ]);
  return element(
    "div",
    {},
    element("h3", {}, "The same token, other choices"),
    element(
      "p",
      { class: "quiet" },
      `A token goes to its own usual choices ${percent(context.agreement, 0)} of the time; ${percent(context.chance, 0)} ` +
        "would be chance, 100 % a router that looks at nothing else.",
    ),
    table(["token", "occurrences", "to its usual", "choices"], rows),
  );
}

function detail(router) {
  const plots = [
    bars(
      "Load of each choice, tokens whose best choice it is, and its mean probability.",
      range(router.choices),
      [
        { name: "load", values: router.load },
        { name: "best", values: router.first },
        { name: "probability", values: router.probability },
      ],
      { across: "choice", upward: "share" },
    ),
    histogram("Confidence: a token's highest probability.", router.confidence_histogram),
    histogram("Margin: highest less second highest probability.", router.margin_histogram),
    router.similarity.weight && square("Similarity of weights (cosine).", router.similarity.weight, "cosine", -1),
    router.similarity.output && square("Similarity of outputs on the same tokens (cosine).", router.similarity.output, "cosine", -1),
    router.together && square("Taken together: share of tokens that take both; on the diagonal, that take it.", router.together, "share", 0),
    ...Object.entries(router.takes).map(([grouping, groups]) => takes(router, grouping, groups)),
  ];
  return [element("div", { class: "grid" }, ...plots.filter(Boolean)), typical(router), inContext(router)];
}

function sampleText(example, name) {
  const { choices, gates, kept } = example.routing[name];
  const words = example.tokens.map((token, place) => {
    const best = choices[place][0];
    const told = () =>
      choices[place]
        .map((choice, rank) => (choice < 0 ? null : `choice ${choice}: gate ${gates[place][rank].toFixed(3)}${kept[place][rank] ? "" : ", dropped"}`))
        .filter(Boolean)
        .join("\n") || "no choice";
    const colours = `background:${shade(best)}`;
    const word = element("span", { class: "token", tabindex: 0, style: colours }, token, element("sub", {}, best < 0 ? "" : String(best)));
    return [example.continues[place] ? "" : " ", explained(word, told)];
  });
  return element("p", { class: "text-sample" }, ...words.flat());
}

function oneRouter() {
  if (!stats.routers.length) return;
  const place = element("div", { id: "router-detail" });
  const texts = element("div", { id: "router-examples" });
  const show = (name) => {
    place.replaceChildren(element("h3", {}, name), ...detail(byName[name]));
    texts.replaceChildren(...stats.examples.filter((example) => name in example.routing).map((example) => sampleText(example, name)));
    return drawAll();
  };
  const select = chooser("router", Object.keys(byName), show);
  recoloured.push(() => show(select.value));
  section("router-section", "One router", control("Router", select), place);
  section(
    "examples",
    "Text, coloured by choice",
    element("p", { class: "quiet" }, "The chosen router's best choice for each token is its colour and its number; point at a token for its gates."),
    texts,
  );
  const worst = stats.verdict.findings.find((finding) => finding.router in byName);
  select.value = worst ? worst.router : stats.routers[stats.routers.length - 1].name;
  show(select.value);
}
