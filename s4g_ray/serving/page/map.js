// The map: a world outline, the gallery's own tiles, and the answer upon them. Nothing is loaded from elsewhere.

import { readTilesInView, showTile, tileAddress } from "./api.js";
import { count, distance, element, metres, percent, position, square } from "./format.js";

const L = globalThis.L;
const TILES_IN_VIEW = 500; // images: the most that a view asks for
const WAIT_MS = 150; // after the last movement of the map

const still = globalThis.matchMedia("(prefers-reduced-motion: reduce)").matches;

export class AnswerMap {
  constructor(container, { onHover, onPick, onHint }) {
    this.onHover = onHover;
    this.onHint = onHint;
    this.onPick = onPick;
    this.map = L.map(container, {
      zoomControl: false,
      minZoom: 1,
      maxZoom: 20,
      zoomSnap: 0.5,
      zoomAnimation: !still,
      fadeAnimation: !still,
      maxBounds: [[-86, -400], [86, 400]],
      maxBoundsViscosity: 0.8,
    });
    L.control.zoom({ position: "topright" }).addTo(this.map);
    L.control.scale({ imperial: false, position: "bottomright" }).addTo(this.map);
    this.map.attributionControl.setPrefix(false).addAttribution("outline: Natural Earth").addAttribution("map: Leaflet");
    this.map.createPane("world").style.zIndex = 150;
    this.map.createPane("region").style.zIndex = 200;
    this.map.createPane("mosaic").style.zIndex = 250;
    this.map.createPane("candidateTiles").style.zIndex = 260;
    this.map.setView([20, 0], 2);
    this.mosaic = new Map();
    this.answerLayer = L.layerGroup().addTo(this.map);
    this.squares = [];
    this.wholeAnswer = null;
    new ResizeObserver(() => this.map.invalidateSize()).observe(container);
  }

  async addWorld() {
    const response = await fetch("static/world.geojson");
    const world = await response.json();
    for (const turn of this.copies ?? [0]) {
      L.geoJSON(world, {
        pane: "world",
        interactive: false,
        style: (feature) => ({ className: feature.properties.kind, weight: 1, fillOpacity: 1 }),
        coordsToLatLng: ([lon, lat]) => L.latLng(lat, lon + turn),
      }).addTo(this.map);
    }
  }

  // Show where the gallery lies, and its tiles where the view is close enough.
  showGallery(gallery) {
    this.showAttribution(gallery.attribution);
    this.region?.remove();
    if (!gallery.bounds) return;
    const isFirst = !this.galleryBounds;
    const [west, south] = gallery.bounds;
    const east = gallery.bounds[2] < west ? gallery.bounds[2] + 360 : gallery.bounds[2];
    const north = gallery.bounds[3];
    if (east > 180 || west < -180) this.copies = [-360, 0, 360];
    this.middleLon = (west + east) / 2;
    this.galleryBounds = L.latLngBounds([south, west], [north, east]);
    this.region = L.rectangle(this.galleryBounds, { pane: "region", className: "gallery-bounds", weight: 1.5, interactive: false })
      .addTo(this.map);
    if (isFirst) {
      this.map.fitBounds(this.galleryBounds, { animate: false, padding: [24, 24] });
      this.map.on("moveend", () => this.scheduleMosaic());
    }
    this.scheduleMosaic();
  }

  // As text: an attribution comes from a file. Long ones are cut until the pointer or the focus is on them.
  showAttribution(attribution) {
    const control = this.map.attributionControl;
    control.setPrefix(attribution ? element("bdi", {}, String(attribution)).outerHTML : false);
    const place = control.getContainer();
    place.title = place.textContent;
    place.tabIndex = 0;
  }

  scheduleMosaic() {
    clearTimeout(this.mosaicTimer);
    this.mosaicTimer = setTimeout(() => this.updateMosaic().catch(() => {}), WAIT_MS);
  }

  async updateMosaic() {
    this.mosaicRequest?.abort();
    this.mosaicRequest = new AbortController();
    const view = this.map.getBounds();
    const bounds = [view.getWest(), Math.max(view.getSouth(), -90), view.getEast(), Math.min(view.getNorth(), 90)];
    const answer = await readTilesInView(bounds, TILES_IN_VIEW, this.mosaicRequest.signal);
    if (answer === null) {
      this.map.off("moveend");
      return;
    }
    const isFar = answer.tiles.length === 0 && this.galleryBounds && this.map.getZoom() < 15 && view.intersects(this.galleryBounds);
    this.onHint(isFar ? "Zoom in to see the tiles" : "");
    const wanted = new Set(answer.tiles.map((tile) => tile.id));
    for (const [id, layer] of this.mosaic) {
      if (!wanted.has(id)) {
        layer.remove();
        this.mosaic.delete(id);
      }
    }
    for (const tile of answer.tiles) {
      if (!this.mosaic.has(tile.id)) this.mosaic.set(tile.id, this.addTile(tile, "mosaic"));
    }
  }

  addTile(tile, pane) {
    const corners = square(tile.lat, tile.lon, tile.size_m, this.middleLon);
    const layer = L.imageOverlay("", corners, { pane, className: "map-tile", alt: "" });
    layer.on("error", () => layer.remove()); // the ground stays empty
    tileAddress(tile.id).then((address) => layer.setUrl(address).addTo(this.map), () => {});
    return layer;
  }

  // Draw an answer: circles, numbered squares of the candidates' ground size, the points.
  show(answer, calibrated) {
    this.clear();
    const all = L.latLngBounds([]);
    const near = L.latLngBounds([]);
    if (answer.lat !== null) this.addCircles(answer, near);
    answer.candidates.forEach((candidate, row) => {
      const bounds = this.addCandidate(candidate, row + 1, calibrated);
      all.extend(bounds);
      if (row === 0) near.extend(bounds);
    });
    if (answer.refined) {
      this.addPoint(answer.refined, "refined", `exact position: ${position(answer.refined.lat, answer.refined.lon)}`);
    }
    if (answer.exif && answer.exif.lat !== null) {
      this.addPoint(answer.exif, "exif", `position stored in the photo: ${position(answer.exif.lat, answer.exif.lon)}`);
    }
    if (near.isValid()) all.extend(near);
    this.wholeAnswer = all.isValid() ? all : null;
    this.showWhole(answer.is_located && near.isValid() ? near : all, answer);
  }

  addCircles(answer, bounds) {
    for (const share of [90, 50]) {
      const radius = answer[`radius_${share}_m`];
      if (radius === null || radius === undefined) continue;
      const circle = L.circle([answer.lat, this.beside(answer.lon)], {
        radius, className: `circle circle-${share}`, weight: 2, interactive: false,
      }).addTo(this.answerLayer);
      bounds.extend(circle.getBounds());
    }
    this.addPoint(answer, "found", `most probable point: ${position(answer.lat, answer.lon)}`);
  }

  addPoint(point, kind, words) {
    const marker = L.circleMarker([point.lat, this.beside(point.lon)], { radius: 6, className: `point point-${kind}`, weight: 2 })
      .bindTooltip(words)
      .addTo(this.answerLayer);
    marker.getElement().setAttribute("role", "img");
    marker.getElement().setAttribute("aria-label", words);
  }

  addCandidate(candidate, rank, calibrated) {
    const size = candidate.size_m > 0 ? candidate.size_m : 0;
    const corners = square(candidate.lat, candidate.lon, size, this.middleLon);
    const bounds = L.latLngBounds(corners);
    const first = rank === 1 ? " first" : "";
    const tile = L.imageOverlay("", corners, { pane: "candidateTiles", className: "map-tile", alt: "" });
    tile.on("error", () => tile.remove());
    if (size > 0) {
      tileAddress(candidate.id).then((address) => tile.setUrl(address).addTo(this.answerLayer), () => {});
    }
    const box = L.rectangle(corners, { className: `square${first}`, weight: 2 }).addTo(this.answerLayer);
    const badge = L.marker([candidate.lat, this.beside(candidate.lon)], {
      icon: L.divIcon({ className: `badge${first}`, html: String(rank), iconSize: [26, 26] }),
      zIndexOffset: 1000 - rank,
    }).addTo(this.answerLayer);
    box.getElement().setAttribute("tabindex", "-1"); // the keyboard reaches the badge
    const value = calibrated ? percent(candidate.probability ?? 0) : `score ${candidate.score.toFixed(3)}`;
    badge.getElement().setAttribute("aria-label", `Candidate ${rank}, ${value}. Enter goes to it.`);
    for (const layer of [box, badge]) {
      layer.bindTooltip(() => tooltip(candidate, rank, value), { direction: "auto", className: "tile-tip", sticky: layer === box });
      layer.on("mouseover", () => this.onHover(rank));
      layer.on("mouseout", () => this.onHover(null));
      layer.on("click", () => this.onPick(rank));
      layer.on("keypress", (event) => { if (event.originalEvent.key === "Enter") this.onPick(rank); });
    }
    this.squares.push({ box, badge, bounds });
    return bounds;
  }

  beside(lon) {
    return this.middleLon === undefined ? lon : lon + 360 * Math.round((this.middleLon - lon) / 360);
  }

  highlight(rank) {
    this.squares.forEach(({ box, badge }, row) => {
      const on = row + 1 === rank;
      box.getElement()?.classList.toggle("on", on);
      badge.getElement()?.classList.toggle("on", on);
      badge.setZIndexOffset(on ? 2000 : 1000 - row);
      if (on) box.bringToFront();
    });
  }

  goTo(rank) {
    const chosen = this.squares[rank - 1];
    if (chosen) this.map.flyToBounds(chosen.bounds.pad(0.6), { maxZoom: 18, animate: !still, duration: 0.5 });
  }

  showWhole(bounds = this.wholeAnswer) {
    if (bounds?.isValid()) {
      this.map.fitBounds(bounds, { padding: [40, 40], maxZoom: 18, animate: !still });
    } else if (this.galleryBounds) {
      this.map.fitBounds(this.galleryBounds, { padding: [24, 24], animate: !still });
    }
  }

  clear() {
    this.answerLayer.clearLayers();
    this.squares = [];
    this.wholeAnswer = null;
  }

  centre() {
    const centre = this.map.getCenter().wrap();
    return position(centre.lat, centre.lng);
  }
}

function tooltip(candidate, rank, value) {
  const image = element("img", { alt: `Tile of candidate ${rank}`, width: 160, height: 160 });
  showTile(image, candidate.id);
  return element("div", {}, image, element("p", {}, element("strong", {}, `Candidate ${rank}`), ` · ${value}`));
}

export function legend(answer, calibrated) {
  const found = [element("span", { class: "key key-square" }, "1"), "candidates, at their size on the ground"];
  if (calibrated && answer.radius_50_m !== null) {
    found.push(element("span", { class: "key key-50" }), "holds the place with 50 %");
    found.push(element("span", { class: "key key-90" }), "with 90 %");
  }
  if (answer.refined) found.push(element("span", { class: "key key-refined" }), "exact position");
  if (answer.exif && answer.exif.lat !== null) found.push(element("span", { class: "key key-exif" }), "stored in the photo");
  return found;
}

// How far a position stored in the photo is from the answer, in words.
export function exifWords(answer) {
  const { exif } = answer;
  const far = answer.lat === null ? "" : `, ${metres(distance(exif.lat, exif.lon, answer.lat, answer.lon))} from the answer`;
  return `${position(exif.lat, exif.lon)}${far}`;
}

export function mergedWords(candidate) {
  const others = (candidate.cells ?? []).length - 1;
  return others > 0 ? `with ${count(others, "overlapping tile")}` : null;
}
