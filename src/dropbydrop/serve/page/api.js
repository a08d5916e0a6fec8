// The server's public protocol, as any other client would speak it.

const KEY = "dropbydrop.key";

/** What went wrong, for people; `status` is that of HTTP, 0 where there was no answer. */
export class ApiError extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** The key is kept for this tab only, and never with the conversations. */
export const setKey = (key) => sessionStorage.setItem(KEY, key);

function headers() {
  const key = sessionStorage.getItem(KEY);
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers() });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const text = await response.text();
  let message = text.slice(0, 400) || response.statusText;
  try {
    message = JSON.parse(text).error?.message ?? message;
  } catch {
    // not JSON: the text itself
  }
  const after = Number(response.headers.get("Retry-After"));
  throw new ApiError(message, response.status, after > 0 ? after : null);
}

export async function getJson(path) {
  return (await request(path)).json();
}

/**
 * The chunks of a streamed chat completion.
 *
 * A stream that ends without `[DONE]` or a finish reason was cut off, which is an error: the text
 * so far would look like a whole answer.
 */
export async function* streamChat(body, signal) {
  const options = { method: "POST", body: JSON.stringify({ ...body, stream: true }), signal };
  const response = await request("/v1/chat/completions", options);
  let whole = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      throw new ApiError("The server sent a line that is not JSON.");
    }
    if (chunk.error) throw new ApiError(chunk.error.message ?? String(chunk.error), 200);
    whole ||= Boolean(chunk.choices?.[0]?.finish_reason);
    yield chunk;
  }
  if (!whole) throw new ApiError("The connection ended in the middle of the answer.");
}

/** The data of server-sent events, however the bytes were cut on their way. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let step;
      try {
        step = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError("The connection was lost in the middle of the answer.");
      }
      if (step.done) return;
      const lines = (rest + step.value).split(/\r\n|\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
