// Times, numbers and sizes as people read them.

const UNITS = [["year", 31_536_000], ["month", 2_592_000], ["week", 604_800], ["day", 86_400], ["hour", 3600], ["minute", 60]];
const relative = new Intl.RelativeTimeFormat("en", { numeric: "auto", style: "short" });
const moment = new Intl.DateTimeFormat("en", { dateStyle: "medium", timeStyle: "short" });
const count = new Intl.NumberFormat("en");

export function number(value) {
  return count.format(value);
}

export function plural(value, one, many = `${one}s`) {
  return `${number(value)} ${value === 1 ? one : many}`;
}

export function ago(text, now = Date.now()) {
  const at = Date.parse(text);
  if (Number.isNaN(at)) return String(text ?? "");
  const seconds = (at - now) / 1000;
  const unit = UNITS.find(([, size]) => Math.abs(seconds) >= size);
  return unit ? relative.format(Math.round(seconds / unit[1]), unit[0]) : "just now";
}

export function when(text) {
  const at = Date.parse(text);
  return Number.isNaN(at) ? String(text ?? "") : moment.format(at);
}

export function size(characters) {
  return characters < 1000 ? `${characters} characters` : characters < 1e6 ? `${(characters / 1e3).toFixed(1)} kB` : `${(characters / 1e6).toFixed(1)} MB`;
}

export function seconds(value) {
  return value < 1 ? `${Math.round(value * 1000)} ms` : value < 60 ? `${value.toFixed(1)} s` : `${Math.round(value / 60)} min`;
}
