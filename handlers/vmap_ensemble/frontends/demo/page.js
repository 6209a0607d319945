// Turns a picture or texts into a request, and its answer into what a person reads. No library, no other host.
"use strict";

const DETAIL = { "X-Ensemble-Detail": "members" };
const find = (id) => document.getElementById(id);
let about = null;
let asked = null; // {body, headers, curl} of the request that the answer on the page is to
let picture = null;

// --- small parts --------------------------------------------------------------------------------------------------

function make(kind, attributes = {}, ...children) {
  const element = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;

// A row of a list: a name, a bar of a share of 1, and the number in words. Other votes than the answer's are grey.
function bar(name, share, number, agrees = true) {
  const row = make("li", agrees ? {} : { class: "other" }, make("span", { class: "name" }, name));
  const track = make("span", { class: "track", "aria-hidden": "true" });
  const fill = make("div", { class: "fill" });
  fill.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  track.append(fill);
  row.append(track, make("span", { class: "number" }, number));
  return row;
}

function say(text, wrong = false) {
  find("status").textContent = text;
  find("status").classList.toggle("wrong", wrong);
}

// --- the form -----------------------------------------------------------------------------------------------------

function buildForm() {
  const fields = find("fields");
  if (about.input === "picture") return buildDrop(fields);
  const sample = about.input === "json" ? { JSON: JSON.stringify(about.sample) } : about.sample;
  for (const [name, value] of Object.entries(sample)) {
    const area = make("textarea", { id: `field-${name}`, name, rows: name === "question" ? 2 : 5, required: "" });
    area.value = value;
    fields.append(make("label", { for: area.id }, name[0].toUpperCase() + name.slice(1)), area);
  }
  find("keys").hidden = false;
}

function buildDrop(fields) {
  const input = make("input", { type: "file", id: "file", accept: "image/*" });
  const drop = make("div", { id: "drop" }, make("label", { for: "file" }, "Drop a picture here, paste one, or choose a file"));
  drop.append(input);
  fields.append(drop);
  input.addEventListener("change", () => take(input.files[0]));
  // Anywhere on the page: the browser would leave it for a picture that misses the frame.
  document.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  for (const name of ["dragleave", "drop"]) document.addEventListener(name, () => drop.classList.remove("over"));
  document.addEventListener("drop", (event) => { event.preventDefault(); take(event.dataTransfer.files[0]); });
  document.addEventListener("paste", (event) => take(event.clipboardData.files[0]));
}

// A picture is asked about as soon as it is there.
function take(file) {
  if (!file) return;
  picture = file;
  find("drop").querySelector("img")?.remove();
  const shown = make("img", { alt: `The picture ${file.name}` });
  shown.src = URL.createObjectURL(file);
  shown.addEventListener("load", () => URL.revokeObjectURL(shown.src));
  find("drop").append(shown);
  ask();
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

// What is sent, and the command that sends the same.
function readForm() {
  const option = `-H ${quoted("X-Ensemble-Detail: members")}`;
  if (about.input === "picture") {
    if (!picture) throw new Error("Choose a picture first");
    return { body: picture, headers: DETAIL, curl: `curl -T ${quoted(picture.name)} ${option}` };
  }
  const areas = [...find("fields").querySelectorAll("textarea")];
  if (areas.some((area) => !area.value.trim())) throw new Error("Type a text first");
  const values = Object.fromEntries(areas.map((area) => [area.name, area.value]));
  const body = about.input === "json" ? values.JSON : JSON.stringify(values);
  return { body, headers: { ...DETAIL, "Content-Type": "application/json" }, curl: `curl --json ${quoted(body)} ${option}` };
}

async function send(kind, request) {
  const reply = await fetch(`${kind}/${about.name}`, { method: "POST", body: request.body, headers: request.headers });
  const body = await reply.json();
  if (!reply.ok) throw new Error(`${reply.status}: ${body.error?.message ?? "no answer"}`);
  return body;
}

async function ask() {
  find("submit").disabled = true;
  say("Asking …");
  try {
    const request = readForm();
    const body = await send("predictions", request);
    asked = request;
    show(body);
    say("");
  } catch (error) {
    find("answer").hidden = true;
    say(error.message, true);
  } finally {
    find("submit").disabled = false;
    refresh();
  }
}

// --- the answer ---------------------------------------------------------------------------------------------------

// The parts of every kind of answer, in words: its headline, and one row for each thing that it is made of.
function headline(part) {
  if (part.labels) return part.labels.map((row) => row.label).join(", ") || "none of the labels";
  if (part.entities) return part.entities.map((row) => `${row.text} (${row.entity})`).join(", ") || "no entities";
  if (part.masks) return part.masks.map((mask) => (mask[0] ?? mask).token).join(", ");
  if (part.values) return part.values.join(", ");
  if (part.embedding) return `a vector of ${part.embedding.length} numbers`;
  if (part.answer !== undefined) return part.answer || "no answer";
  return part.label ?? "";
}

function shares(part) {
  return (part.labels ?? part.entities ?? part.masks ?? [part])
    .map((row) => (row[0] ?? row).probability ?? (row[0] ?? row).score)
    .filter((share) => share !== undefined);
}

function ranked(body) {
  const rows = body.top_k ?? body.entities ?? body.masks?.flat() ?? [];
  return rows.map((row) => [row.label ?? row.answer ?? row.token ?? `${row.text} (${row.entity})`, row.probability ?? row.score]);
}

function show(body) {
  const main = body.prediction ?? body;
  find("headline").textContent = headline(main);
  find("abstains").hidden = !body.abstain;
  find("abstains").textContent = `The ensemble abstains: ${(body.abstain_reasons ?? ["beyond its limits"]).join(", ")}.`;
  const rows = ranked(body);
  find("ranked-part").hidden = !rows.length;
  find("ranked").replaceChildren(...rows.map(([name, share]) => bar(name || "no answer", share, percent(share))));
  showMembers(body.members ?? [], headline(main));
  showUncertainty(body.uncertainty ?? {});
  find("explanation-part").hidden = !about.explains;
  find("explanation").replaceChildren();
  find("json").textContent = JSON.stringify(body, null, 2);
  find("curl").textContent = `${asked.curl} \\\n    ${location.origin}/predictions/${about.name}`;
  find("answer").hidden = false;
  find("answer").focus();
}

function showMembers(members, answer) {
  find("members-part").hidden = !members.length;
  const agreeing = members.filter((member) => headline(member) === answer).length;
  const counted = members.length && headline(members[0]) !== "" && !members[0].values;
  find("votes").textContent = counted ? `${agreeing} of ${members.length} say the same as the ensemble.` : "";
  find("members").replaceChildren(...members.map((member) => {
    const own = shares(member);
    const share = member.cosine ?? (own.length ? Math.min(...own) : 0);
    const number = member.cosine !== undefined ? `cosine ${share.toFixed(3)}` : own.length ? percent(share) : "";
    return bar(`${member.name}: ${headline(member)}`, share, number, !counted || headline(member) === answer);
  }));
}

const NAMES = {
  agreement: "Agreement of the members", mutual_information: "Disagreement (mutual information)",
  predictive_entropy: "Predictive entropy", expected_entropy: "Expected entropy",
  standard_deviation: "Standard deviation", spread: "Spread",
};

// Entropies are in nats, and shown against the most that so many classes can have.
function showUncertainty(four) {
  const numbers = Object.entries(four).filter(([key]) => key !== "agreement").map(([, value]) => [value].flat()[0]);
  const most = Math.max(Math.log(about.labels || 1), ...numbers, 1e-9);
  find("uncertainty").replaceChildren(...Object.entries(four).map(([key, value]) => {
    const number = [value].flat()[0];
    if (key === "agreement") return bar(NAMES[key], number, percent(number));
    const unit = /entropy|information/.test(key) ? " nats" : "";
    return bar(NAMES[key] ?? key, number / most, `${number.toPrecision(2)}${unit}`);
  }));
}

// --- the explanation ----------------------------------------------------------------------------------------------

async function explain() {
  find("explain").disabled = true;
  find("explanation").replaceChildren("Explaining …");
  try {
    const body = await send("explanations", asked);
    const rows = body.explanations.flatMap((row) => explanation(row, body.explains));
    find("explanation").replaceChildren(...rows);
  } catch (error) {
    find("explanation").replaceChildren(error.message);
  } finally {
    find("explain").disabled = false;
  }
}

function explanation(row, explains) {
  const most = Math.max(...row.importances.map(Math.abs), 1e-9);
  const named = row.label ?? row.entity ?? row.token ?? row.answer ?? "";
  const title = make("p", {}, `The ${explains} of “${named}”: ${row.value.toPrecision(3)}, without the words ${row.baseline.toPrecision(3)}. `
    + "Blue words speak for it, orange ones against it.");
  const words = make("p", { class: "words" });
  const table = make("table", {}, make("tr", {}, make("th", { scope: "col" }, "Word"), make("th", { scope: "col" }, "Adds")));
  row.words.forEach((word, index) => {
    const adds = row.importances[index];
    const shown = make("span", { title: adds.toFixed(3) }, word.word);
    const colour = getComputedStyle(document.documentElement).getPropertyValue(adds > 0 ? "--for" : "--against");
    shown.style.background = `rgba(${colour}, ${(0.45 * Math.abs(adds)) / most})`;
    words.append(shown, " ");
    table.append(make("tr", {}, make("td", {}, word.word), make("td", {}, adds.toFixed(3))));
  });
  return [title, words, make("details", {}, make("summary", {}, "As a table"), table)];
}

// --- the last minutes ---------------------------------------------------------------------------------------------

const shown = (value, digits, unit) => (value === null ? "–" : `${value.toFixed(digits)}${unit}`);

async function refresh() {
  let now;
  try {
    now = await (await fetch("figures")).json();
  } catch {
    find("numbers").replaceChildren(make("dt", {}, "The command behind this page has ended"));
    return;
  }
  const replies = Object.entries(now.replies).map(([status, count]) => `${count} × ${status}`).join(", ");
  const rows = {
    [`Replies in ${now.minutes} minutes`]: replies || "none",
    "A reply": shown(now.reply_ms, 1, " ms"), "A forward": shown(now.forward_ms, 1, " ms"),
    "Items in a forward": shown(now.items_in_a_forward, 1, ""),
    "Disagreement": shown(now.mutual_information, 3, " nats"), "Abstentions": String(now.abstentions),
  };
  find("numbers").replaceChildren(...Object.entries(rows).map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  drawSpark(now);
}

function drawSpark(now) {
  const most = Math.max(...now.requests, 1), width = 300 / now.requests.length;
  const total = now.requests.reduce((sum, count) => sum + count, 0);
  find("spark").setAttribute("aria-label", `${total} requests in ${now.minutes} minutes, at most ${most} in ${now.step_s} seconds`);
  find("spark").replaceChildren(...now.requests.map((count, index) => {
    const column = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const place = { x: index * width + 1, y: 46 - 44 * (count / most), width: width - 2, height: 2 + 44 * (count / most) };
    for (const [name, value] of Object.entries(place)) column.setAttribute(name, value);
    return column;
  }));
}

// --- the start ----------------------------------------------------------------------------------------------------

async function start() {
  about = await (await fetch("about")).json();
  document.title = `${about.ensemble} · ensemble of ${about.members.length}`;
  find("title").textContent = about.ensemble;
  find("facts").textContent = `${about.members.length} members of ${about.architecture ?? "one architecture"}, `
    + `${about.dtype} on ${about.device}, run ${about.execution}`;
  buildForm();
  find("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
  find("ask").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); ask(); }
  });
  find("explain").addEventListener("click", explain);
  find("copy").addEventListener("click", async () => {
    await navigator.clipboard.writeText(find("curl").textContent);
    say("Copied");
  });
  refresh();
  setInterval(refresh, 2000);
}

start();
