// The settings of a request. An empty field is not sent, so the server's default holds.

import { html, useEffect, useRef } from "./vendor/htm-preact.js";

const FIELDS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: "any" }, "0 takes the likeliest token"],
  ["top_p", "Top p", { min: 0, max: 1, step: "any" }, "share of probability that is sampled from"],
  ["min_p", "Min p", { min: 0, max: 1, step: "any" }, "least probability, as a share of the likeliest"],
  ["max_tokens", "Most tokens", { min: 1, step: 1 }, "of one answer"],
  ["seed", "Seed", { step: 1 }, "the same seed, settings and level give the same answer"],
];

export function SettingsDialog({ open, onClose, settings, onSettings }) {
  const dialog = useRef(null);
  useEffect(() => {
    if (open && !dialog.current.open) dialog.current.showModal();
  }, [open]);
  const close = () => dialog.current.close();
  return html`<dialog ref=${dialog} class="dialog" aria-labelledby="settings-title" onClose=${onClose}
    onClick=${(event) => event.target === dialog.current && close()}>
    <div class="inside">
      <h2 id="settings-title">Settings</h2>
      <label class="field">System prompt
        <textarea rows="3" value=${settings.system} onInput=${(event) => onSettings({ system: event.target.value })} />
      </label>
      <div class="grid">
        ${FIELDS.map(([name, label, limits, hint]) => html`<label class="field" key=${name}>${label}
          <input type="number" ...${limits} value=${settings[name]} placeholder="server's default" aria-describedby=${`hint-${name}`}
            onInput=${(event) => onSettings({ [name]: event.target.value })} onKeyDown=${(event) => {
              if (event.key === "Enter") { event.preventDefault(); close(); }
            }} />
          <small id=${`hint-${name}`}>${hint}</small></label>`)}
      </div>
      <div class="row end"><button type="button" class="primary" onClick=${close}>Done</button></div>
    </div>
  </dialog>`;
}
