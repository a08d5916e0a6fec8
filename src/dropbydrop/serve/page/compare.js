// One prompt at several levels at once: parallel requests to one copy of the weights, greedy and
// with one seed, so that nothing but the precision can make them differ.

import { firstDifference, receive, requestBody } from "./answer.js";
import { bytes, depth, named, rate } from "./precision.js";
import { html, useEffect, useRef, useState } from "./vendor/htm-preact.js";

const MOST = 3; // answers side by side

/** The levels that are compared, the highest last: it is what the others are compared with. */
export function compared(levels) {
  const bits = levels.map((level) => level.bits).sort((a, b) => a - b);
  const usual = [2, 3, 4].filter((b) => bits.includes(b));
  return usual.length >= 2 ? usual : bits.slice(-MOST);
}

/** Where an answer leaves the reference: a token's index, or null as long as it has not. */
export function parting(answer, reference) {
  if (!answer || !reference) return null;
  const at = firstDifference(answer.tokens, reference.tokens);
  const [a, b] = [answer.tokens.length, reference.tokens.length];
  const ended = (x) => x.finish === "stop";
  if (at === null && a !== b && ended(a < b ? answer : reference)) return Math.min(a, b);
  return at;
}

function Tokens({ answer, at }) {
  if (at === null) return html`<div class="tokens">${answer.content}</div>`;
  const before = answer.tokens.slice(0, at).join("");
  const after = answer.tokens.slice(at + 1).join("");
  return html`<div class="tokens">${before}<mark title="first differing token">${answer.tokens[at] ?? "■"}</mark><span class="after">${after}</span></div>`;
}

function Column({ bits, answer, reference, levels, running }) {
  const isReference = answer === reference;
  const at = isReference ? null : parting(answer, reference);
  const level = levels.find((l) => l.bits === bits);
  const best = named(Math.max(...compared(levels)));
  const verdict = !answer ? "" : isReference ? "what the others are compared with"
    : at !== null ? `leaves ${best} at token ${at + 1}`
    : running ? "" : answer.error ? "" : `same as ${best}`;
  return html`<section class="column" aria-label=${named(bits)}>
    <h2><i class="chip" style=${depth(levels, bits)} aria-hidden="true" />${named(bits)}
      <span class="figure">${level ? `${bytes(level.bytes_per_token)} a token` : ""}</span></h2>
    <div class="answer" aria-busy=${running}>
      ${answer ? html`<${Tokens} answer=${answer} at=${at} />` : html`<p class="hint">No answer yet</p>`}
      ${answer?.error && html`<div class="failure" role="alert">${answer.error.message}</div>`}
    </div>
    <p class="verdict" data-parting=${at === null ? "" : at}>${verdict}</p>
    <div class="figures">
      <span class="figure">${answer ? rate(answer.stats.perSecond) : "–"} tokens/s</span>
      <span class="figure">${answer?.stats.tokens ?? 0} tokens</span>
      ${answer && answer.stats.bits != null && answer.stats.bits !== bits &&
        html`<span class="note">answered at ${named(answer.stats.bits)}</span>`}
    </div>
  </section>`;
}

export function Compare({ status, settings }) {
  const [prompt, setPrompt] = useState("");
  const [limit, setLimit] = useState("96");
  const [answers, setAnswers] = useState({});
  const [running, setRunning] = useState(null);
  const [said, setSaid] = useState("");
  const mounted = useRef(true);
  useEffect(() => () => (mounted.current = false), []);
  const levels = status?.levels ?? [];
  const chosen = compared(levels);
  const highest = Math.max(...chosen);

  const run = async (event) => {
    event.preventDefault();
    if (running || !prompt.trim() || !status) return;
    const abort = new AbortController();
    setRunning(abort);
    setAnswers({});
    setSaid("Answering at every level");
    const greedy = { system: settings.system, temperature: "0", top_p: "", min_p: "", max_tokens: limit, seed: "0" };
    const messages = [{ role: "user", content: prompt.trim() }];
    const found = {};
    await Promise.all(chosen.map(async (bits) => {
      const body = requestBody(status.model, messages, greedy, bits);
      found[bits] = await receive(body, abort.signal, (answer) => setAnswers((before) => ({ ...before, [bits]: answer })));
    }));
    const words = chosen.slice(0, -1).map((bits) => {
      const at = parting(found[bits], found[highest]);
      return `${named(bits)} ${at === null ? `is the same as ${named(highest)}` : `leaves ${named(highest)} at token ${at + 1}`}`;
    });
    setSaid(words.join("; "));
    setRunning(null);
  };
  return html`<div class="compare">
    <form class="ask" onSubmit=${run}>
      <label class="field grow">Prompt for every level
        <textarea rows="2" value=${prompt} placeholder="Why is the sky blue?" onInput=${(event) => setPrompt(event.target.value)}
          onKeyDown=${(event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && run(event)} />
      </label>
      <div class="row end">
        <label class="field small">Most tokens
          <input type="number" min="1" value=${limit} onInput=${(event) => setLimit(event.target.value)} /></label>
        ${running
          ? html`<button type="button" class="primary" key="stop" onClick=${() => running.abort()}>Stop</button>`
          : html`<button class="primary" key="run" disabled=${!prompt.trim() || !status}>Compare</button>`}
      </div>
    </form>
    <p class="hint">Parallel requests to one copy of the weights; greedy, one seed. The first token that differs from
      ${" "}${levels.length ? named(highest) : "the highest level"} is marked.</p>
    <p class="hidden" role="status">${said}</p>
    <div class="columns">${chosen.map((bits) => html`<${Column} key=${bits} bits=${bits} levels=${levels}
      answer=${answers[bits]} reference=${answers[highest]} running=${Boolean(running)} />`)}</div>
  </div>`;
}
