// What the server is doing: a line in the header, and a view with curves of the last two minutes.

import { bytes, depth, named, rate } from "./precision.js";
import { html } from "./vendor/htm-preact.js";

export function Meter({ status, error }) {
  const down = error && error.status !== 401;
  const words = down ? "no answer" : !status ? "connecting"
    : `${status.running} running, ${status.queue} waiting`;
  const state = down ? "down" : !status ? "" : status.queue > 0 ? "busy" : "idle";
  return html`<a href="#load" class=${`meter ${state}`} aria-label=${`Load: ${words}`}>
    <i aria-hidden="true" /><span class="figure">${words}</span>
    ${status && !down && html`<span class="figure level">auto ${named(status.level)}</span>`}
  </a>`;
}

/** A curve of samples over the last two minutes; steps where the value is one of few. */
function Curve({ samples, value, label, text, steps = false, most }) {
  const [width, height, pad] = [600, 80, 4];
  const end = samples.length ? samples[samples.length - 1].at : 0;
  const top = Math.max(most ?? 0, ...samples.map(value), 1e-9) * 1.05;
  const x = (s) => width - ((end - s.at) / 120000) * width;
  const y = (s) => height - pad - (value(s) / top) * (height - 2 * pad);
  const points = samples.flatMap((s, i) =>
    steps && i > 0 ? [`${x(s)},${y(samples[i - 1])}`, `${x(s)},${y(s)}`] : [`${x(s)},${y(s)}`]);
  return html`<figure class="curve">
    <figcaption><span>${label}</span><b class="figure">${text}</b></figcaption>
    <svg viewBox=${`0 0 ${width} ${height}`} preserveAspectRatio="none" role="img" aria-label=${`${label}, last two minutes: ${text} now`}>
      <line x1="0" x2=${width} y1=${height - pad} y2=${height - pad} />
      <polyline points=${points.join(" ")} />
    </svg>
  </figure>`;
}

function Fact({ label, children, hint }) {
  return html`<div class="fact"><dt>${label}</dt><dd class="figure">${children}</dd>${hint && html`<small>${hint}</small>`}</div>`;
}

function duration(seconds) {
  const [days, hours, minutes] = [Math.floor(seconds / 86400), Math.floor(seconds / 3600) % 24, Math.floor(seconds / 60) % 60];
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min` : `${Math.floor(seconds)} s`;
}

export function Load({ status, samples, error }) {
  if (!status) return html`<div class="load"><p class="hint">${error ? error.message : "Asking the server …"}</p></div>`;
  const target = status.target_tps;
  return html`<div class="load">
    ${error && html`<div class="failure" role="alert">${error.message} The figures below are the last ones.</div>`}
    <dl class="facts">
      <${Fact} label="Level that auto gets" hint=${target ? `target ${rate(target)} tokens/s for a request` : "no target: auto is the highest level"}>${named(status.level)}<//>
      <${Fact} label="Running">${status.running}<//>
      <${Fact} label="Waiting" hint=${`room for ${status.capacity} in all`}>${status.queue}<//>
      <${Fact} label="Moved down" hint="changes to fewer bits in the middle of an answer">${status.shed.moved_down}<//>
      <${Fact} label="Turned away" hint="the queue was full">${status.shed.rejected}<//>
      <${Fact} label="Up">${duration(status.uptime)}<//>
    </dl>
    <div class="curves">
      <${Curve} samples=${samples} value=${(s) => s.tokens_per_second} label="Tokens a second, all requests" text=${rate(status.tokens_per_second)} />
      <${Curve} samples=${samples} value=${(s) => s.queue + s.running} label="Requests, running and waiting" text=${`${status.running + status.queue}`} most=${status.capacity} steps />
      <${Curve} samples=${samples} value=${(s) => s.level} label="Level that auto gets" text=${named(status.level)} most=${Math.max(...status.levels.map((l) => l.bits))} steps />
    </div>
    <table class="table">
      <caption>Levels, all from one copy of the weights</caption>
      <thead><tr><th scope="col">Level</th><th scope="col">Read a token</th><th scope="col">Tokens/s alone</th><th scope="col">Model name</th></tr></thead>
      <tbody>${status.levels.map((level) => html`<tr key=${level.bits}>
        <th scope="row"><i class="chip" style=${depth(status.levels, level.bits)} aria-hidden="true" />${named(level.bits)}</th>
        <td class="figure">${bytes(level.bytes_per_token)}</td>
        <td class="figure">${level.seconds_per_token ? rate(1 / level.seconds_per_token) : "not measured"}</td>
        <td><code>${level.id}</code></td></tr>`)}</tbody>
    </table>
  </div>`;
}
