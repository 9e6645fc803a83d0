// Numbers as people read them, and small DOM helpers.

const EARTH_RADIUS_M = 6371008.8;
const RADIANS = Math.PI / 180;

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

// A file's name for people: without control characters, nor those that turn the direction of what follows.
export function shownName(name) {
  return name.replace(/[\p{Cc}\u200e\u200f\u202a-\u202e\u2066-\u2069]/gu, "");
}

export function count(number, one, many = `${one}s`) {
  return `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
}

export function metres(length) {
  if (length === null || length === undefined || !Number.isFinite(length)) return "unknown";
  if (length >= 99_950) return `${Math.round(length / 1000).toLocaleString("en")} km`;
  if (length >= 9_995) return `${(length / 1000).toFixed(1)} km`;
  if (length >= 1_000) return `${(length / 1000).toFixed(2)} km`;
  return length >= 10 ? `${Math.round(length)} m` : `${length.toFixed(1)} m`;
}

export function percent(share) {
  if (share > 0 && share < 0.01) return "< 1 %";
  if (share > 0.99 && share < 1) return "> 99 %";
  return `${Math.round(share * 100)} %`;
}

export function position(lat, lon) {
  return `${lat.toFixed(5)}, ${lon.toFixed(5)}`;
}

export function direction(degrees) {
  const names = ["north", "north-east", "east", "south-east", "south", "south-west", "west", "north-west"];
  const turned = ((degrees % 360) + 360) % 360;
  return `${Math.round(turned) % 360}° (${names[Math.round(turned / 45) % 8]})`;
}

export function distance(latA, lonA, latB, lonB) {
  const dLat = (latB - latA) * RADIANS;
  const dLon = (lonB - lonA) * RADIANS;
  const h = Math.sin(dLat / 2) ** 2 + Math.cos(latA * RADIANS) * Math.cos(latB * RADIANS) * Math.sin(dLon / 2) ** 2;
  return 2 * EARTH_RADIUS_M * Math.asin(Math.min(1, Math.sqrt(h)));
}

// South-west and north-east corners of a square of `size` metres about a point, beside `lonNear` (antimeridian).
export function square(lat, lon, size, lonNear = lon) {
  const half = size / 2 / EARTH_RADIUS_M / RADIANS;
  const halfLon = half / Math.max(Math.cos(lat * RADIANS), 1e-6);
  const near = lon + 360 * Math.round((lonNear - lon) / 360);
  return [[lat - half, near - halfLon], [lat + half, near + halfLon]];
}
