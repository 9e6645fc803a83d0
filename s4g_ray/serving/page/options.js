// The search options of the page.

const byId = (id) => document.getElementById(id);

export function setUpOptions({ centre, onAgain }) {
  byId("options-form").addEventListener("submit", (event) => event.preventDefault());
  byId("near-on").addEventListener("change", (event) => {
    byId("near-fields").disabled = !event.target.checked;
    if (event.target.checked && !byId("near").value) byId("near").value = centre();
  });
  byId("use-centre").addEventListener("click", () => { byId("near").value = centre(); });
  byId("near").addEventListener("input", () => readNear());
  byId("again").addEventListener("click", onAgain);
  return { read };
}

// The options as the service takes them. A point that cannot be read is left to the service's own message.
function read() {
  const top = Math.min(Math.max(Number.parseInt(byId("top").value, 10) || 5, 1), 50);
  return {
    top,
    turns: Number.parseInt(byId("turns").value, 10),
    refine: byId("refine").checked,
    near: byId("near-on").checked ? readNear() : null,
    withinKm: Number.parseFloat(byId("within").value) || 10,
  };
}

function readNear() {
  const field = byId("near");
  const parts = field.value.split(/[\s,;]+/).filter(Boolean);
  const numbers = parts.map(Number);
  const good = numbers.length === 2 && numbers.every(Number.isFinite) && Math.abs(numbers[0]) <= 90;
  field.setCustomValidity(good ? "" : "Latitude and longitude in degrees, such as 41.20, -112.30");
  field.setAttribute("aria-invalid", String(!good));
  return good ? numbers : parts;
}
