// The sketch pad. gradio runs this as a function's body, with: element, trigger, props, upload.
// A stroke ends -> the sheet is uploaded as drawing.png -> the file becomes this component's value, and the
// page hands the value on to the picture component. An empty sheet is no picture: null.
const PAUSE = 250; // milliseconds without a stroke before the drawing is handed over
const MEMORY = 20; // strokes that can be undone
const EMPTY = "The sheet is empty: draw something, then ask about it.";
const READY = "This drawing is the picture now: ask about it.";
const FAILED = "The drawing could not be sent: draw on, or clear the sheet, to try again.";

const pad = element.querySelector(".pad");
const canvas = pad.querySelector("canvas");
const thickness = pad.querySelector("input[type=range]");
const undo = pad.querySelector(".undo");
const status = pad.querySelector("[role=status]");
const ink = canvas.getContext("2d", { willReadFrequently: true });
const before = []; // the sheet as it was before each stroke
let stroke = null; // the one under way: its pointer, last point, and end of the line so far
let timer = 0;
let turn = 0; // counts what was handed over; an upload that finds it changed comes too late
let isOpen = false;
let stashed = null; // the picture of the page when the pad was opened

function blank() {
  ink.fillStyle = "#ffffff";
  ink.fillRect(0, 0, canvas.width, canvas.height);
}

function isEmpty() {
  const { data } = ink.getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < data.length; i += 4) {
    if (Math.min(data[i], data[i + 1], data[i + 2]) < 215) return false;
  }
  return true;
}

function say(state, text) {
  pad.dataset.state = state;
  status.textContent = text;
}

function give(file) {
  props.value = file;
  trigger("input");
}

async function handOver() {
  clearTimeout(timer);
  const mine = ++turn;
  if (isEmpty()) {
    say("empty", EMPTY);
    give(null);
    return;
  }
  try {
    const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
    const { path, url } = await upload(new File([blob], "drawing.png", { type: "image/png" }));
    if (mine !== turn) return;
    say("ready", READY);
    give({ path, url, orig_name: "drawing.png", mime_type: "image/png", meta: { _type: "gradio.FileData" } });
  } catch (error) {
    if (mine !== turn) return;
    say("failed", FAILED);
    give(null); // rather no picture than one that is not what the sheet shows
  }
}

function handOverSoon() {
  clearTimeout(timer);
  timer = setTimeout(handOver, PAUSE);
}

function remember() {
  before.push(ink.getImageData(0, 0, canvas.width, canvas.height));
  if (before.length > MEMORY) before.shift();
  undo.disabled = false;
}

function point(event) {
  const box = canvas.getBoundingClientRect();
  return [
    ((event.clientX - box.left) / box.width) * canvas.width,
    ((event.clientY - box.top) / box.height) * canvas.height,
  ];
}

function line(from, bend, to) {
  ink.beginPath();
  ink.moveTo(...from);
  ink.quadraticCurveTo(...bend, ...to);
  ink.stroke();
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button !== 0 || stroke) return;
  event.preventDefault();
  canvas.setPointerCapture(event.pointerId);
  clearTimeout(timer);
  turn += 1;
  remember();
  say("drawing", "");
  const color = pad.querySelector("input[name=pad-brush]:checked").value;
  const width = Number(thickness.value);
  Object.assign(ink, { lineCap: "round", lineJoin: "round" });
  ink.strokeStyle = ink.fillStyle = color || "#ffffff";
  ink.lineWidth = color ? width : 2.5 * width; // an eraser as thin as a pen would be a chore
  const start = point(event);
  stroke = { pointer: event.pointerId, last: start, end: start };
  ink.beginPath(); // a touch alone is a dot; a curve of no length would draw nothing
  ink.arc(...start, ink.lineWidth / 2, 0, 2 * Math.PI);
  ink.fill();
});

canvas.addEventListener("pointermove", (event) => {
  if (event.pointerId !== stroke?.pointer) return;
  const steps = event.getCoalescedEvents?.() ?? [];
  for (const step of steps.length ? steps : [event]) {
    const next = point(step);
    const middle = [(stroke.last[0] + next[0]) / 2, (stroke.last[1] + next[1]) / 2];
    line(stroke.end, stroke.last, middle); // curves through the middles: corners of a hand are round
    Object.assign(stroke, { last: next, end: middle });
  }
});

function lift(event) {
  if (event.pointerId !== stroke?.pointer) return;
  line(stroke.end, stroke.last, stroke.last);
  stroke = null;
  handOverSoon();
}

canvas.addEventListener("pointerup", lift);
canvas.addEventListener("pointercancel", lift);

undo.addEventListener("click", () => {
  ink.putImageData(before.pop(), 0, 0);
  undo.disabled = before.length === 0;
  handOver();
});

pad.querySelector(".clear").addEventListener("click", () => {
  if (!isEmpty()) remember();
  blank();
  handOver();
});

pad.pad = {
  open(file) {
    if (isOpen) return;
    isOpen = true;
    stashed = file;
    handOver();
  },
  close() {
    if (!isOpen) return;
    isOpen = false;
    clearTimeout(timer);
    turn += 1;
    give(stashed);
  },
};

blank();
say("empty", EMPTY);
