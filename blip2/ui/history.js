// Earlier conversations, kept in this browser alone. gradio runs this as a function's body, with: element,
// trigger, props, watch. The server sends {record}, after each answer; a click sends {open: record} back.
const KEY = "blip2-conversations";
const LIMIT = 4_000_000; // characters of JSON; browsers give a site about five million

const list = element.querySelector("ul");
const status = element.querySelector("[role=status]");

function read() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEY) ?? "[]");
    return Array.isArray(kept) ? kept : [];
  } catch {
    return []; // another program's, or no storage here
  }
}

function write(records) {
  const before = records.length;
  for (;;) {
    const text = JSON.stringify(records);
    try {
      if (text.length > LIMIT && records.length > 1) throw new Error("full");
      localStorage.setItem(KEY, text);
      break;
    } catch {
      if (!records.length) break; // no storage at all
      records = records.slice(0, -1);
    }
  }
  const dropped = before - records.length;
  status.textContent = dropped ? `There was no room left: the oldest ${dropped > 1 ? `${dropped} ` : ""}left.` : "";
  draw();
}

function button(text, label, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.dataset.act = act;
  made.setAttribute("aria-label", label);
  made.textContent = text;
  return made;
}

function draw() {
  const records = read();
  element.querySelector(".none").hidden = records.length > 0;
  element.querySelector(".all").hidden = records.length === 0;
  list.replaceChildren(
    ...records.map((record) => {
      const first = String(record.turns?.[0]?.question ?? "");
      const item = document.createElement("li");
      item.dataset.id = record.id;
      const open = button("", `Open: ${first}`, "open");
      const picture = document.createElement("img");
      picture.alt = "";
      if (String(record.picture).startsWith("data:image/jpeg;base64,")) picture.src = record.picture;
      const words = document.createElement("span");
      const count = record.turns?.length ?? 0;
      const when = new Date(record.time * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
      const facts = document.createElement("small");
      facts.textContent = `${record.model} · ${count} ${count === 1 ? "question" : "questions"} · ${when}`;
      words.append(first, facts);
      open.append(picture, words);
      item.append(open, button("×", `Forget: ${first}`, "forget"));
      return item;
    }),
  );
}

function keep(record) {
  const others = read().filter((other) => other.id !== record.id);
  write(record.turns.length ? [record, ...others] : others);
}

element.addEventListener("click", (event) => {
  const act = event.target.closest("button")?.dataset.act;
  const id = event.target.closest("li")?.dataset.id;
  if (act === "all") write([]);
  if (act === "forget") write(read().filter((record) => record.id !== id));
  if (act === "open") {
    props.value = { open: read().find((record) => record.id === id) };
    trigger("select");
  }
});

addEventListener("storage", draw); // another window of this page
watch("value", () => (props.value?.record ? keep(props.value.record) : draw()));
draw();
