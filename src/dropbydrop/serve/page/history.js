// Conversations in this browser's localStorage, and nowhere else; as a file on request.

const STORE = "dropbydrop.conversations";
const SETTINGS = "dropbydrop.settings";
const FORMAT = "dropbydrop-conversations";

export const DEFAULTS = { system: "", temperature: "", top_p: "", min_p: "", max_tokens: "", seed: "" };

function stored(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** False where the browser's storage is full or forbidden: what is shown is then not kept. */
function store(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export const loadConversations = () => stored(STORE, []).filter(valid);
export const saveConversations = (all) => store(STORE, all.filter((c) => c.messages.length > 0));
export const loadSettings = () => ({ ...DEFAULTS, bits: "auto", ...stored(SETTINGS, {}) });
export const saveSettings = (settings) => store(SETTINGS, settings);

export const fresh = () => ({ id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`,
  created: new Date().toISOString(), messages: [] });

export function title(conversation) {
  const first = conversation.messages.find((message) => message.role === "user");
  return first ? first.content.trim().slice(0, 60) || "…" : "New conversation";
}

export function download(all) {
  const text = JSON.stringify({ format: FORMAT, version: 1, conversations: all }, null, 2);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "conversations.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** Conversations of an exported file; throws an Error that says what is wrong. */
export async function upload(file) {
  let found;
  try {
    found = JSON.parse(await file.text());
  } catch {
    throw new Error(`${file.name} is not JSON.`);
  }
  if (found?.format !== FORMAT || !Array.isArray(found.conversations)) {
    throw new Error(`${file.name} is not an export of this page.`);
  }
  return found.conversations.filter(valid);
}

const valid = (c) =>
  typeof c?.id === "string" && Array.isArray(c.messages) &&
  c.messages.every((m) => ["user", "assistant"].includes(m?.role) && typeof m.content === "string");
