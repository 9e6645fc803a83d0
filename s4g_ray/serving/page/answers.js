// An answer in words: position, share of probability, candidates beside the photo.

import { showTile } from "./api.js";
import { count, direction, distance, element, metres, percent, position } from "./format.js";
import { exifWords, mergedWords } from "./map.js";

export function isCalibrated(answer) {
  return answer.candidates.some((candidate) => candidate.probability !== null && candidate.probability !== undefined);
}

// What is read aloud when an answer arrives.
export function spokenAnswer(answer, name) {
  if (!answer.is_located) return `${name}: no answer. ${answer.reason ?? ""}`;
  const best = answer.candidates[0];
  const share = isCalibrated(answer) && best ? `, best candidate ${percent(best.probability)}` : "";
  return `${name}: ${position(answer.lat, answer.lon)}${share}`;
}

export function renderError(photo, onRetry) {
  const { error } = photo;
  return element("div", { class: "callout bad", role: "alert" },
    element("strong", {}, errorTitle(error)),
    element("p", {}, error.message.startsWith(photo.name) ? error.message : sentence(error.message)),
    isWorthATry(error) ? element("button", { type: "button", onclick: onRetry }, "Try again") : null);
}

// A photo that is too large or damaged stays so.
function isWorthATry({ status, code }) {
  return status < 400 || status >= 500 || [401, 408, 429].includes(status) || code === "bad_parameter";
}

function errorTitle(error) {
  const byCode = {
    bad_photo: "The photo cannot be read",
    bad_parameter: "The search options do not fit",
    too_late: "The service took too long",
  };
  const titles = {
    0: "The service cannot be reached",
    400: "The request was refused",
    401: "An access token is needed",
    403: "Access was refused",
    408: "The service took too long",
    413: "The photo is too large",
    415: "This is not a photo that can be read",
    422: "The photo cannot be located",
    503: "The service is busy",
  };
  return byCode[error.code] ?? titles[error.status] ?? "The photo could not be located";
}

export function renderWaiting(photo) {
  let words = photo.state === "waiting" ? "Waits for the photos before it …" : "Searching the gallery …";
  if (photo.isSlow) words = "Still searching. The service has much to do, or the photo is large …";
  if (photo.busyS) words = `The service is busy. Trying again in ${Math.ceil(photo.busyS)} s …`;
  return element("div", { class: "card waiting" }, element("span", { class: "spinner", "aria-hidden": "true" }), words);
}

export function renderAnswer(photo, { onHover, onPick, onSave }) {
  const { answer } = photo;
  const calibrated = isCalibrated(answer);
  const parts = [renderSummary(photo, calibrated)];
  if (answer.candidates.length > 0) {
    parts.push(renderComparison(photo));
    parts.push(element("h2", {}, answer.is_located ? "Candidates" : "The closest tiles, none of them an answer"));
    parts.push(renderCandidates(answer, calibrated, { onHover, onPick }));
  }
  parts.push(element("div", { class: "row actions" },
    element("button", { type: "button", onclick: () => onSave("geojson") }, "Save as GeoJSON"),
    element("button", { type: "button", onclick: () => onSave("json") }, "Save as JSON"),
    element("span", { class: "hint fine" }, `${photo.seconds.toFixed(2)} s`)));
  return parts;
}

function renderSummary(photo, calibrated) {
  const { answer } = photo;
  if (!answer.is_located) {
    return element("div", { class: "callout warn", id: "summary" },
      element("strong", {}, "No answer"),
      element("p", {}, sentence(answer.reason ?? "the gallery holds no tile that is likely enough")),
      element("p", { class: "hint" }, answer.candidates.length > 0
        ? "The closest tiles are listed below for your own judgement. The photo may lie outside of the gallery's region."
        : "No tile was compared. Try other search options."),
      exifLine(answer));
  }
  const facts = [];
  if (calibrated && answer.radius_50_m !== null) {
    facts.push(element("p", {}, "The place lies within ", element("strong", {}, metres(answer.radius_50_m)), " with 50 % and within ",
      element("strong", {}, metres(answer.radius_90_m)), " with 90 % probability."));
  }
  if (!calibrated) {
    facts.push(element("p", { class: "hint" }, "Not calibrated: the best match, without a probability."));
  }
  if (answer.note && calibrated) facts.push(element("p", { class: "hint" }, sentence(answer.note)));
  if (answer.heading_deg !== null && answer.heading_deg !== undefined) {
    facts.push(element("p", {}, `The top of the photo faces ${direction(answer.heading_deg)}.`));
  }
  if (answer.refined) facts.push(refinedLine(answer.refined));
  return element("div", { class: "card summary", id: "summary" },
    element("p", { class: "label" }, calibrated ? "Most probable place" : "Best match"),
    element("div", { class: "row" }, element("output", { class: "position" }, position(answer.lat, answer.lon)),
      copyButton(answer, "Copy the position"), appLink(answer)),
    ...facts, exifLine(answer));
}

function sentence(words) {
  const text = words.charAt(0).toUpperCase() + words.slice(1);
  return /[.!?]$/.test(text) ? text : `${text}.`;
}

function refinedLine(refined) {
  return element("p", {}, "Exact position by details: ", element("strong", {}, position(refined.lat, refined.lon)),
    ` (${count(refined.inliers, "matching point")}). `, copyButton(refined, "Copy the exact position"));
}

// Opens the position in the map program of a phone; the style shows it on screens that are touched.
function appLink({ lat, lon }) {
  const place = position(lat, lon).replace(" ", "");
  return element("a", { class: "button small app-link", href: `geo:${place}?q=${place}` }, "Open in a map app");
}

function exifLine(answer) {
  if (!answer.exif || answer.exif.lat === null) return null;
  return element("p", { class: "hint" }, `The photo itself says ${exifWords(answer)}. It was not used for the search unless you asked.`);
}

function copyButton(place, words) {
  const button = element("button", { type: "button", class: "small", title: words }, "Copy");
  button.addEventListener("click", async () => {
    button.textContent = (await copyText(position(place.lat, place.lon))) ? "Copied" : "Copy is not allowed";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  return button;
}

// Browsers offer a clipboard only to https and localhost; elsewhere a selected text can be copied.
async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text).then(() => true, () => false);
  const field = element("textarea", { class: "visually-hidden", readonly: true });
  field.value = text;
  const focused = document.activeElement;
  document.body.append(field);
  field.select();
  const isDone = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return isDone;
}

function renderComparison(photo) {
  const image = element("img", { id: "compared-tile", alt: "Tile of candidate 1" });
  showTile(image, photo.answer.candidates[0].id);
  return element("div", { class: "comparison" },
    element("figure", {}, photoPicture(photo, `Your photo ${photo.name}`), element("figcaption", {}, "Your photo")),
    element("figure", {}, image, element("figcaption", { id: "compared-caption" }, "Candidate 1")));
}

// The photo, or its name where the browser cannot decode it (HEIC, TIFF).
export function photoPicture(photo, alt, words = "no preview in this browser") {
  const image = element("img", { src: photo.url, alt, decoding: "async" });
  image.addEventListener("error", () => {
    image.replaceWith(element("span", { class: "no-preview" }, words));
  });
  return image;
}

function renderCandidates(answer, calibrated, { onHover, onPick }) {
  const best = answer.candidates[0];
  const highest = best.score;
  const lowest = Math.min(...answer.candidates.map((candidate) => candidate.score), 0);
  const rows = answer.candidates.map((candidate, row) => {
    const share = calibrated ? candidate.probability ?? 0 : (candidate.score - lowest) / Math.max(highest - lowest, 1e-9);
    return renderCandidate({ candidate, rank: row + 1, share, calibrated, best, onHover, onPick });
  });
  const list = element("ol", { class: "candidates" }, ...rows);
  list.addEventListener("keydown", moveFocus);
  if (!calibrated) return list;
  const total = answer.candidates.reduce((sum, candidate) => sum + (candidate.probability ?? 0), 0);
  const outside = answer.none_probability ?? null;
  const rest = Math.max(0, 1 - total - (outside ?? 0));
  return element("div", {}, list,
    otherShare(outside === null ? "Anywhere else" : "Elsewhere in the gallery", rest),
    outside === null ? null : otherShare("Outside of the gallery", outside));
}

function otherShare(words, share) {
  return element("div", { class: "elsewhere" }, element("span", {}, words), bar(share), element("span", { class: "value" }, percent(share)));
}

function bar(share) {
  const fill = element("span", { class: "fill" });
  fill.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return element("span", { class: "share", "aria-hidden": "true" }, fill);
}

function renderCandidate({ candidate, rank, share, calibrated, best, onHover, onPick }) {
  const image = element("img", { alt: "", width: 56, height: 56, loading: "lazy" });
  showTile(image, candidate.id);
  const value = calibrated ? percent(share) : candidate.score.toFixed(3);
  const details = [
    candidate.size_m > 0 && (rank === 1 || candidate.size_m !== best.size_m) ? `tile of ${metres(candidate.size_m)}` : null,
    rank > 1 ? `${metres(distance(candidate.lat, candidate.lon, best.lat, best.lon))} from candidate 1` : null,
    candidate.turn_deg ? `turned by ${Math.round(candidate.turn_deg)}°` : null,
    mergedWords(candidate),
  ].filter(Boolean);
  const spoken = `Candidate ${rank}, ${calibrated ? "probability" : "score"} ${value}, ${position(candidate.lat, candidate.lon)}`;
  return element("li", {},
    element("button", {
      type: "button",
      class: "candidate",
      "data-rank": rank,
      "data-tile": candidate.id,
      "aria-label": spoken,
      onclick: () => onPick(rank),
      onmouseenter: () => onHover(rank),
      onmouseleave: () => onHover(null),
      onfocus: () => onHover(rank),
      onblur: () => onHover(null),
    },
    element("span", { class: rank === 1 ? "number first" : "number" }, String(rank)),
    image,
    element("span", { class: "words" },
      element("span", { class: "where" }, position(candidate.lat, candidate.lon)),
      bar(share),
      element("span", { class: "hint fine" }, details.join(" · "))),
    element("span", { class: "value" }, value)));
}

function moveFocus(event) {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step) return;
  const buttons = [...event.currentTarget.querySelectorAll("button")];
  const next = buttons[buttons.indexOf(document.activeElement) + step];
  if (next) {
    event.preventDefault();
    next.focus();
  }
}
