// The page: photos in, answers out. One request a photo, a few at a time.

import { setUpOptions } from "./options.js";
import { ServiceError, hasToken, locate, parseJson, readGallery, setToken, showTile } from "./api.js";
import { isCalibrated, photoPicture, renderAnswer, renderError, renderWaiting, spokenAnswer } from "./answers.js";
import { count, element, metres, shownName } from "./format.js";
import { AnswerMap, legend } from "./map.js";

const AT_ONCE = 2; // requests
const RETRY_GALLERY_MS = 3000;
const SLOW_MS = 6000; // then a waiting person is told that the search goes on

const byId = (id) => document.getElementById(id);
const photos = [];
let selected = null;
let running = 0;
let galleryVersion = null;

const map = new AnswerMap(byId("map"), { onHover: hover, onPick: pick, onHint: showHint });
const options = setUpOptions({ centre: () => map.centre(), onAgain: () => selected && searchAgain(selected) });

function addFiles(files) {
  const added = [...files].map((file) => ({ file, name: shownName(file.name) || "Pasted photo", url: URL.createObjectURL(file), state: "waiting" }));
  if (added.length === 0) return;
  for (const photo of added) {
    if (photo.file.type && !photo.file.type.startsWith("image/")) {
      photo.state = "failed";
      photo.error = new ServiceError(415, "no_photo", `${photo.name} is ${photo.file.type}. Give a JPEG, PNG, WebP, TIFF or HEIC image.`);
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
  const slow = setTimeout(() => {
    photo.isSlow = true;
    update(photo);
  }, SLOW_MS);
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
    announce(spokenAnswer(photo.answer, photo.name));
    if (body.gallery.version !== galleryVersion) openGallery();
  } catch (error) {
    photo.error = error;
    photo.state = "failed";
    if (error.status === 401) askForToken();
  }
  clearTimeout(slow);
  photo.isSlow = false;
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
  renderThumb(photo);
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
  map.showWhole();
  const picture = element("figure", { class: "alone" }, photoPicture(photo, `Your photo ${photo.name}`));
  const words = photo.state === "failed" ? renderError(photo, () => searchAgain(photo)) : renderWaiting(photo);
  place.replaceChildren(...titled(photo, [words, picture]));
}

function titled(photo, parts) {
  return photos.length > 1 ? [element("h2", { class: "name", dir: "auto", title: photo.name }, photo.name), ...parts] : parts;
}

// One button a photo, made once: a strip of hundreds is not decoded anew for each answer.
function renderStrip() {
  const strip = byId("photos");
  strip.hidden = photos.length < 2;
  for (const photo of photos) {
    if (!photo.button) {
      const ending = photo.name.split(".").pop().slice(0, 5);
      const mark = element("span", { class: "mark", "aria-hidden": "true" });
      photo.button = element("button", { type: "button", onclick: () => select(photo) }, photoPicture(photo, "", ending), mark);
      strip.append(photo.button);
    }
    renderThumb(photo);
  }
}

function renderThumb(photo) {
  const { button } = photo;
  if (!button) return;
  const state = stateWords(photo);
  const words = `${photo.name}: ${state.words}`;
  button.className = `thumb ${state.kind}`;
  button.setAttribute("aria-pressed", String(photo === selected));
  button.setAttribute("aria-label", words);
  button.title = words;
  button.lastElementChild.textContent = state.mark;
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
  const name = `${photo.name.replace(/\.[^.]*$/, "") || "photo"}.${format}`;
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

function showHint(words) {
  byId("map-hint").textContent = words;
  byId("map-hint").hidden = !words;
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
  byId("token-refused").hidden = !hasToken();
  byId("token").focus();
}

async function openGallery() {
  try {
    const gallery = await readGallery();
    byId("banner").hidden = true;
    galleryVersion = gallery.version;
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
  const words = facts.filter(Boolean).join(" · ").replace(" · of ", " of ");
  byId("gallery-facts").textContent = words;
  byId("gallery-facts").title = words;
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
