// Requests to the service. All addresses are relative, so that the page works behind a path prefix.

const TRIES_WHEN_BUSY = 6;
const LONGEST_WAIT_S = 15;
const LONGEST_ANSWER_MS = 90_000; // the service refuses what takes it longer than its own limits, by default 50 s
const TOKEN = "s4g-token";

export class ServiceError extends Error {
  constructor(status, code, message, retryAfterS = null) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfterS = retryAfterS;
  }
}

// Ids are int64: numbers beyond 2^53 become strings, or they would lose digits.
export function parseJson(text) {
  const whole = /"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/g;
  const safe = text.replace(whole, (part) => (/^-?\d{16,}$/.test(part) ? `"${part}"` : part));
  return JSON.parse(safe);
}

export function hasToken() {
  return Boolean(sessionStorage.getItem(TOKEN));
}

export function setToken(token) {
  sessionStorage.setItem(TOKEN, token);
}

function headers() {
  const token = sessionStorage.getItem(TOKEN);
  return token ? { Authorization: `Bearer ${token}` } : {};
}

async function request(address, { signal = AbortSignal.timeout(LONGEST_ANSWER_MS), ...init } = {}) {
  let response;
  try {
    response = await fetch(address, { ...init, headers: headers(), cache: "no-cache", signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (error.name === "TimeoutError") {
      throw new ServiceError(0, "unreachable", `The service did not answer within ${LONGEST_ANSWER_MS / 1000} s.`);
    }
    throw new ServiceError(0, "unreachable", "The service does not answer. Is it still running?");
  }
  if (!response.ok) throw await readError(response);
  return response;
}

async function readError(response) {
  const wait = Number.parseFloat(response.headers.get("Retry-After"));
  let code = "error";
  let message = `The service answered ${response.status} ${response.statusText}`.trim();
  try {
    const body = await response.json();
    code = body.error?.code ?? code;
    message = body.error?.message ?? message;
  } catch {
    // not JSON (a proxy's page): the status says enough
  }
  return new ServiceError(response.status, code, message, Number.isFinite(wait) ? wait : null);
}

export async function readGallery() {
  return parseJson(await (await request("gallery")).text());
}

// The tiles that cover ground in view, none where they are more than `limit`; null where the service has no such list.
export async function readTilesInView([west, south, east, north], limit, signal) {
  const query = new URLSearchParams({ bounds: [west, south, east, north].join(","), limit });
  try {
    const response = await request(`gallery/tiles?${query}`, { signal });
    return parseJson(await response.text());
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}

const tileAddresses = new Map();

// The address of a tile's image: fetched with the token where there is one, which <img> cannot send.
export function tileAddress(id) {
  const plain = `tiles/${id}`;
  if (!hasToken()) return Promise.resolve(plain);
  if (!tileAddresses.has(id)) {
    const loaded = request(plain).then((response) => response.blob()).then((blob) => URL.createObjectURL(blob));
    loaded.catch(() => tileAddresses.delete(id));
    tileAddresses.set(id, loaded);
  }
  return tileAddresses.get(id);
}

// Put a tile's image into an <img>; it says in words when it cannot be loaded.
export function showTile(image, id) {
  image.onerror = () => {
    image.removeAttribute("src");
    image.classList.add("missing");
    image.alt = "The tile's image cannot be loaded";
  };
  tileAddress(id).then((address) => { image.src = address; }, image.onerror);
}

function locateQuery(options, format) {
  const query = new URLSearchParams({ top: options.top, turns: options.turns, format });
  if (options.refine) query.set("refine", "true");
  if (options.near) {
    query.set("near", options.near.join(","));
    query.set("within_km", options.withinKm);
  }
  return query;
}

// Locate one photo; gives the text of the answer. While the service is busy, waits as long as it asks and tries again.
export async function locate(file, options, { format = "json", onBusy = () => {} } = {}) {
  for (let tries = 1; ; tries += 1) {
    const body = new FormData();
    body.append("photo", file, file.name || "pasted.png");
    try {
      const response = await request(`locate?${locateQuery(options, format)}`, { method: "POST", body });
      return await response.text();
    } catch (error) {
      if (error.status !== 503 || tries >= TRIES_WHEN_BUSY) throw error;
      const waitS = Math.min(error.retryAfterS ?? 1, LONGEST_WAIT_S);
      onBusy(waitS);
      await new Promise((resume) => setTimeout(resume, waitS * 1000));
    }
  }
}
