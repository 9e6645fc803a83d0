// The page: photos in, answers out. One request a photo, a few at a time.

import { answerTitle, setUpOptions } from "./options.js";
import { ServiceError, locate, parseJson, readGallery, setToken, showTile } from "./api.js";
import { isCalibrated, photoPicture, renderAnswer, renderError, renderWaiting, spokenAnswer } from "./answers.js";
import { count, element, metres } from "./format.js";
import { AnswerMap, legend } from "./map.js";

const AT_ONCE = 2; // requests
const RETRY_GALLERY_MS = 3000;

const byId = (id) => document.getElementById(id);
const photos = [];
let selected = null;
let running = 0;

const map = new AnswerMap(byId("map"), { onHover: hover, onPick: pick });
const options = setUpOptions({ centre: () => map.centre(), onAgain: () => selected && searchAgain(selected) });

function addFiles(files) {
  const added = [...files].map((file) => ({ file, url: URL.createObjectURL(file), state: "waiting" }));
  if (added.length === 0) return;
  for (const photo of added) {
    if (photo.file.type && !photo.file.type.startsWith("image/")) {
      photo.state = "failed";
      photo.error = new ServiceError(415, "no_photo", `${photo.file.name} is ${photo.file.type}. Give a JPEG, PNG, WebP, TIFF or HEIC image.`);
    }
  }
  photos.push(...added);
  document.body.classList.add("has-photos");
  select(added[0]);
  renderStrip();
  next();
}

function next() {
  const photo = photos.find((each) => each.state === "waiting");
  if (!photo || running >= AT_ONCE) return;
  running += 1;
  search(photo).finally(() => {
    running -= 1;
    next();
  });
  next();
}

async function search(photo) {
  photo.state = "searching";
  photo.error = null;
  update(photo);
  const busy = (waitS) => {
    photo.busyS = waitS;
    update(photo);
  };
  try {
    photo.options = options.read();
    photo.text = await locate(photo.file, photo.options, { onBusy: busy });
    const body = parseJson(photo.text);
    photo.answer = body.answers[0];
    photo.seconds = body.seconds;
    photo.state = "done";
    announce(spokenAnswer(photo.answer, photo.file.name));
  } catch (error) {
    photo.error = error;
    photo.state = "failed";
    if (error.status === 401) askForToken();
  }
  photo.busyS = null;
  update(photo);
}

function searchAgain(photo) {
  if (photo.state === "searching") return;
  photo.state = "waiting";
  update(photo);
  next();
}

function update(photo) {
  renderStrip();
  if (photo === selected) show(photo);
}

function select(photo) {
  selected = photo;
  byId("again").disabled = false;
  show(photo);
  renderStrip();
}

function show(photo) {
  const place = byId("answer");
  const key = byId("legend");
  key.hidden = true;
  place.setAttribute("aria-busy", String(photo.state === "searching" || photo.state === "waiting"));
  if (photo.state === "done") {
    const calibrated = isCalibrated(photo.answer);
    place.replaceChildren(...titled(photo, renderAnswer(photo, { onHover: hover, onPick: pick, onSave: (format) => save(photo, format) })));
    map.show(photo.answer, calibrated);
    key.replaceChildren(...legend(photo.answer, calibrated));
    key.hidden = photo.answer.candidates.length === 0;
    return;
  }
  map.clear();
  const picture = element("figure", { class: "alone" }, photoPicture(photo, `Your photo ${photo.file.name}`));
  const words = photo.state === "failed" ? renderError(photo, () => searchAgain(photo)) : renderWaiting(photo);
  place.replaceChildren(...titled(photo, [words, picture]));
}

function titled(photo, parts) {
  return photos.length > 1 ? [element("h2", { class: "name" }, answerTitle(photo)), ...parts] : parts;
}

function renderStrip() {
  const strip = byId("photos");
  strip.hidden = photos.length < 2;
  const focused = strip.contains(document.activeElement) ? document.activeElement.dataset.row : null;
  strip.replaceChildren(...photos.map((photo, row) => {
    const state = stateWords(photo);
    const button = element("button", {
      type: "button",
      class: `thumb ${state.kind}`,
      "data-row": row,
      "aria-pressed": String(photo === selected),
      "aria-label": `${photo.file.name}: ${state.words}`,
      title: `${photo.file.name}: ${state.words}`,
      onclick: () => select(photo),
    }, photoPicture(photo, "", photo.file.name.split(".").pop().slice(0, 5)), element("span", { class: "mark", "aria-hidden": "true" }, state.mark));
    return button;
  }));
  if (focused !== null) strip.children[focused]?.focus();
}

function stateWords(photo) {
  if (photo.state === "failed") return { kind: "bad", mark: "!", words: "failed" };
  if (photo.state !== "done") return { kind: "busy", mark: "…", words: "searching" };
  return photo.answer.is_located ? { kind: "good", mark: "✓", words: "located" } : { kind: "warn", mark: "–", words: "no answer" };
}

function hover(rank) {
  map.highlight(rank);
  for (const button of document.querySelectorAll(".candidate")) {
    button.classList.toggle("on", Number(button.dataset.rank) === rank);
  }
}

// Compare a candidate with the photo and go to it on the map.
function pick(rank) {
  const candidate = selected.answer.candidates[rank - 1];
  const image = byId("compared-tile");
  image.alt = `Tile of candidate ${rank}`;
  showTile(image, candidate.id);
  byId("compared-caption").textContent = `Candidate ${rank}`;
  hover(rank);
  map.goTo(rank);
}

// Save the answer that is shown: the service's own text, or the same search as GeoJSON.
async function save(photo, format) {
  const name = `${photo.file.name.replace(/\.[^.]*$/, "") || "photo"}.${format}`;
  try {
    const text = format === "json"
      ? photo.text
      : await locate(photo.file, photo.options, { format });
    const link = element("a", { href: URL.createObjectURL(new Blob([text])), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  } catch (error) {
    announce(error.message);
    banner(error.message, "bad");
  }
}

function announce(words) {
  byId("status").textContent = words;
}

function banner(words, kind) {
  const place = byId("banner");
  place.textContent = words;
  place.className = `callout ${kind}`;
  place.hidden = false;
}

function askForToken() {
  byId("token-form").hidden = false;
  byId("token").focus();
}

async function openGallery() {
  try {
    const gallery = await readGallery();
    byId("banner").hidden = true;
    showFacts(gallery);
    map.showGallery(gallery);
    if (!gallery.has_calibration) {
      banner("This gallery is not calibrated: answers show scores instead of probabilities. `s4g gallery calibrate` fits them.", "note");
    }
  } catch (error) {
    if (error.status === 401) return askForToken();
    banner(`The gallery cannot be opened yet: ${error.message}`, "bad");
    setTimeout(openGallery, RETRY_GALLERY_MS);
  }
  return null;
}

function showFacts(gallery) {
  const sizes = [gallery.size_m ?? []].flat().filter((size) => size > 0).map(metres);
  const facts = [gallery.name, count(gallery.num_tiles, "tile"), sizes.length ? `of ${sizes.join(", ")}` : null, `version ${gallery.version}`];
  byId("gallery-facts").textContent = facts.filter(Boolean).join(" · ").replace(" · of ", " of ");
}

function listen() {
  byId("file").addEventListener("change", (event) => {
    addFiles(event.target.files);
    event.target.value = "";
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length > 0) addFiles(event.clipboardData.files);
  });
  listenToDrops();
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") map.showWhole();
  });
  byId("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setToken(byId("token").value);
    byId("token-form").hidden = true;
    openGallery();
    photos.filter((photo) => photo.error?.status === 401).forEach(searchAgain);
  });
}

// The whole window takes drops, so that a photo beside the box does not replace the page.
function listenToDrops() {
  let depth = 0;
  const veil = byId("veil");
  const drag = (change) => (event) => {
    event.preventDefault();
    depth = Math.max(0, depth + change);
    veil.hidden = depth === 0;
  };
  document.addEventListener("dragenter", drag(1));
  document.addEventListener("dragleave", drag(-1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    depth = 0;
    veil.hidden = true;
    addFiles(event.dataTransfer.files);
  });
}

listen();
await openGallery();
await map.addWorld();
