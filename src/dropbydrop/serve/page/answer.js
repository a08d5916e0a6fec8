// One answer while it comes: text, tokens, the level of each token, and how fast they came.

import { streamChat } from "./api.js";

const number = (text) => (String(text).trim() === "" || Number.isNaN(Number(text)) ? undefined : Number(text));

/** The body of a request. A setting that is left empty is not sent: the server's default holds. */
export function requestBody(model, messages, settings, bits) {
  const system = settings.system.trim();
  return {
    model,
    bits,
    messages: [
      ...(system ? [{ role: "system", content: system }] : []),
      ...messages.map(({ role, content }) => ({ role, content })),
    ],
    stream_options: { include_usage: true },
    temperature: number(settings.temperature),
    top_p: number(settings.top_p),
    min_p: number(settings.min_p),
    max_tokens: number(settings.max_tokens),
    seed: number(settings.seed),
  };
}

/**
 * Stream one answer; `onChange(answer)` is called at most every 40 ms and at the end.
 *
 * The answer is { content, reasoning, tokens: [text], stats, finish, error }. It is given back in
 * every case: what came before an error or a stop is kept, and says so.
 */
export async function receive(body, signal, onChange) {
  const answer = { content: "", reasoning: "", tokens: [], finish: null, error: null,
    stats: { asked: body.bits, bits: null, switches: [], tokens: 0, perSecond: null, bytes: null } };
  let first = null;
  let shown = 0;
  try {
    for await (const chunk of streamChat(body, signal)) {
      const choice = chunk.choices?.[0];
      const delta = choice?.delta ?? {};
      const thought = delta.reasoning_content ?? "";
      const text = delta.content ?? "";
      answer.finish = choice?.finish_reason ?? answer.finish;
      if (text || thought) {
        const now = performance.now();
        first ??= now;
        answer.content += text;
        answer.reasoning += thought;
        if (text) answer.tokens.push(text);
        answer.stats.tokens += 1;
        if (now > first) answer.stats.perSecond = ((answer.stats.tokens - 1) * 1000) / (now - first);
      }
      note(answer.stats, chunk);
      if (performance.now() - shown > 40) {
        shown = performance.now();
        onChange({ ...answer });
      }
    }
  } catch (error) {
    if (error.name === "AbortError") answer.finish = "stopped";
    else answer.error = { message: error.message, status: error.status ?? 0, retryAfter: error.retryAfter ?? null };
  }
  onChange({ ...answer });
  return answer;
}

/** What a chunk says about the precision, and the last ones about counts and times. */
function note(stats, chunk) {
  const ours = chunk.dropbydrop;
  if (ours?.bits != null) {
    const { switches } = stats;
    if (!ours.switches && stats.bits !== ours.bits) {
      switches.push([Math.max(0, stats.tokens - 1), ours.bits]);
    }
    stats.bits = ours.bits;
  }
  if (ours?.switches) stats.switches = ours.switches;
  if (ours?.asked != null) stats.asked = ours.asked;
  if (ours?.bytes_per_token != null) stats.bytes = ours.bytes_per_token;
  if (chunk.usage) stats.tokens = chunk.usage.completion_tokens;
  const times = chunk.timings;
  if (times) {
    stats.tokens = times.predicted_n ?? stats.tokens;
    stats.perSecond = times.predicted_per_second ?? stats.perSecond;
    stats.promptTokens = times.prompt_n;
    stats.promptPerSecond = times.prompt_per_second;
    stats.cached = times.cache_n;
  }
}

/** Runs of one level: [{ bits, tokens }], whose tokens sum to those of the answer. */
export function runs(stats) {
  const starts = stats.switches.length ? stats.switches : [[0, stats.bits]];
  return starts
    .map(([start, bits], i) => ({ bits, tokens: (starts[i + 1]?.[0] ?? stats.tokens) - start }))
    .filter((run) => run.tokens > 0);
}

/** A text and the reasoning that some models put before it between <think> tags. */
export function parts(message) {
  const found = /^\s*<think>([\s\S]*?)(?:<\/think>|$)/.exec(message.content);
  if (!found) return { reasoning: message.reasoning ?? "", text: message.content };
  return { reasoning: found[1].trim(), text: message.content.slice(found[0].length) };
}

/** Index of the first token in which two answers differ; null where one begins the other. */
export function firstDifference(tokens, others) {
  const shared = Math.min(tokens.length, others.length);
  for (let i = 0; i < shared; i += 1) if (tokens[i] !== others[i]) return i;
  return null;
}
