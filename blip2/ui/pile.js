// The table of the Folder tab. gradio runs this as a function's body, with: element, trigger, props, watch.
// A value comes -> rows that are new are made, those that are there stay as they are, with what is being typed.
// Everything in a value is text, and is shown as text.
const pile = element.querySelector(".pile");
const body = pile.querySelector(".rows");
const pager = pile.querySelector("nav");
const [previous, next] = pager.querySelectorAll("button");
const edits = new Map(); // "row:made:which" -> the visitor's text; it wins over what the server still sends

function make(tag, settings = {}, ...children) {
  const made = Object.assign(document.createElement(tag), settings);
  made.append(...children);
  return made;
}

function cell(label, ...children) {
  const made = make("div", { className: label.toLowerCase() }, ...children);
  made.setAttribute("role", "cell");
  return made;
}

function caption(row, text, which) {
  const key = [row.id, row.made, which].join(":");
  const field = make("textarea", { rows: 1, value: edits.get(key) ?? text });
  const count = row.captions.length > 1 ? `Caption ${which + 1}` : "Caption";
  field.setAttribute("aria-label", `${count} of ${row.name}`);
  const score = row.match[which];
  const match = make("span", { className: "score" });
  if (score !== undefined && score !== null && !edits.has(key)) {
    match.append(
      make("meter", { min: 0, max: 1, value: score, ariaLabel: `Match of ${row.name}` }),
      ` ${Math.round(100 * score)}%`,
    );
  }
  field.addEventListener("input", () => {
    edits.set(key, field.value);
    match.replaceChildren(); // it was the old caption's
  });
  field.addEventListener("change", () => trigger("input"));
  return make("div", { className: "line" }, field, match);
}

function line(row) {
  const image = make("img", { src: row.thumbnail, alt: "", hidden: !row.thumbnail });
  const said = row.captions
    ? row.captions.map((text, which) => caption(row, text, which))
    : [make("p", { className: "reason", textContent: row.reason })];
  const answers = (row.answers ?? []).map(([asked, reply]) =>
    make("p", { className: "answer" }, make("span", { textContent: asked }), " ", make("b", { textContent: reply })),
  );
  const made = make(
    "div",
    { className: "row" },
    cell("Picture", image, make("span", { className: "name", textContent: row.name })),
    cell("Captions", ...said, ...answers),
  );
  made.setAttribute("role", "row");
  made.dataset.key = `${row.id}:${row.made}`;
  return made;
}

function render() {
  const { rows = [], first = 1, total = 0, page = 1, pages = 1 } = props.value ?? {};
  const there = new Map([...body.children].map((row) => [row.dataset.key, row]));
  const wanted = rows.map((row) => there.get(`${row.id}:${row.made}`) ?? line(row));
  for (const row of [...body.children]) if (!wanted.includes(row)) row.remove();
  wanted.forEach((row, place) => {
    if (body.children[place] !== row) body.insertBefore(row, body.children[place] ?? null);
  });
  pile.hidden = total === 0;
  pager.hidden = pages < 2;
  pager.querySelector("span").textContent = `${first}–${first + rows.length - 1} of ${total}`;
  previous.disabled = page <= 1;
  next.disabled = page >= pages;
}

previous.addEventListener("click", () => trigger("select", { by: -1 }));
next.addEventListener("click", () => trigger("select", { by: 1 }));
pile.edits = () =>
  JSON.stringify([...edits].map(([key, text]) => [...key.split(":").map(Number), text]));
watch("value", render);
render();
