// The precision of the next answer: a slider over "auto", the levels, and the averages half-way
// between them; and how a precision is written and coloured everywhere on the page.

import { html } from "./vendor/htm-preact.js";

/** "auto" and the precisions that can be asked for, in the order of the slider. */
export function stops(levels) {
  const bits = levels.map((level) => level.bits).sort((a, b) => a - b);
  const between = bits.flatMap((b, i) => (i + 1 < bits.length ? [b, (b + bits[i + 1]) / 2] : [b]));
  return ["auto", ...between];
}

export const named = (bits) =>
  bits === "auto" ? "auto" : `${Number(bits.toFixed(2))} ${bits === 1 ? "bit" : "bits"}`;

/** Bytes that a token reads at this precision, between levels in proportion; null if unknown. */
export function bytesAt(levels, bits) {
  if (bits === "auto") return null;
  const sorted = [...levels].sort((a, b) => a.bits - b.bits);
  const above = sorted.findIndex((level) => level.bits >= bits);
  if (above < 0) return null;
  const high = sorted[above];
  if (high.bits === bits || above === 0) return high.bytes_per_token;
  const low = sorted[above - 1];
  const share = (bits - low.bits) / (high.bits - low.bits);
  return low.bytes_per_token + share * (high.bytes_per_token - low.bytes_per_token);
}

export function bytes(count) {
  if (!Number.isFinite(count)) return "–";
  const unit = count >= 1e9 ? 9 : count >= 1e6 ? 6 : 3;
  const value = count / 10 ** unit;
  return `${value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0)} ${{ 9: "GB", 6: "MB", 3: "kB" }[unit]}`;
}

export const rate = (perSecond) =>
  Number.isFinite(perSecond) ? perSecond.toFixed(perSecond < 100 ? 1 : 0) : "–";

/** A colour for a level: the lowest is light, the highest dark (style.css reads --depth). */
export const depth = (levels, bits) => {
  const all = levels.map((level) => level.bits);
  const [low, high] = [Math.min(...all), Math.max(...all)];
  return { "--depth": `${high > low ? Math.round((100 * (bits - low)) / (high - low)) : 100}%` };
};

export function PrecisionSlider({ status, bits, onChange }) {
  const levels = status?.levels ?? [];
  const all = stops(levels);
  const at = Math.max(0, all.indexOf(bits));
  const chosen = all[at];
  const last = Math.max(1, all.length - 1);
  const auto = status ? ` (${named(status.level)} now)` : "";
  const spoken = chosen === "auto" ? `auto: the server chooses${auto}` : named(chosen);
  const read = bytesAt(levels, chosen);
  return html`<div class="precision">
    <label for="precision">Precision</label>
    <div class="scale">
      <input id="precision" type="range" min="0" max=${last} step="1" value=${at}
        list="stops" aria-valuetext=${spoken} disabled=${levels.length === 0}
        onInput=${(event) => onChange(all[Number(event.target.value)])} />
      <datalist id="stops">
        ${all.map((stop, i) => Number.isInteger(stop) || stop === "auto"
          ? html`<option key=${i} value=${i} label=${stop} />` : null)}
      </datalist>
      <div class="ticks" aria-hidden="true">
        ${all.map((stop, i) => html`<span key=${i} class=${stop === chosen ? "on" : ""}
          style=${{ left: `${(100 * i) / last}%` }}>${Number.isInteger(stop) || stop === "auto" ? stop : "·"}</span>`)}
      </div>
    </div>
    <output for="precision" class="figure">
      <b>${named(chosen)}</b>
      <span>${chosen === "auto" ? (status ? `${named(status.level)} now` : "") : `${bytes(read)} a token`}</span>
    </output>
  </div>`;
}
