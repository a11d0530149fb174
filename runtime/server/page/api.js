// The server's API: what is asked, and what goes wrong in words.

import { eventsOf } from "./events.js";

/** An error of the server, or of the way to it, in words for whoever asks. */
export class ServerError extends Error {
  /**
   * @param {string} message
   * @param {number} status Of HTTP; 0 where there was no response.
   */
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/**
 * Return the models that the server has.
 * @param {string} key API key; "" for none.
 * @returns {Promise<{id: string, target?: string, max_model_len?: number}[]>}
 */
export async function listModels(key) {
  const response = await reach("v1/models", { headers: headers(key) });
  let found = [];
  try {
    found = (await response.json()).data ?? [];
  } catch {
    // Not ours; said below.
  }
  if (!found.length) throw new ServerError("The server names no models. See whether it is the one that you mean.");
  return found;
}

/**
 * Ask, and yield the chunks of the answer as they come.
 * @param {object} body The request.
 * @param {string} key API key; "" for none.
 * @param {AbortSignal} signal Ends the request.
 */
export async function* askForChunks(body, key, signal) {
  const response = await reach("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "content-type": "application/json", accept: "text/event-stream" },
    body: JSON.stringify(body),
    signal,
  });
  let isComplete = false;
  try {
    for await (const data of eventsOf(response.body)) {
      if (data === "[DONE]") {
        isComplete = true;
        break;
      }
      const chunk = parsed(data);
      if (chunk.error) throw new ServerError(messageOf(chunk, response.status), response.status);
      yield chunk;
    }
  } catch (error) {
    throw error instanceof TypeError ? new ServerError(BROKEN_OFF) : error;
  }
  if (!isComplete) throw new ServerError(BROKEN_OFF);
}

const BROKEN_OFF = "The connection ended before the answer did. Ask again; if that repeats, look at the server’s log.";

function headers(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

/** Fetch below this page, so that a server behind a path of a proxy is found, too. */
async function reach(path, options) {
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(
      "The server cannot be reached, or hung up before it answered. See whether it runs; if large files are attached, try smaller ones.",
    );
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  let found = null;
  try {
    found = await response.json();
  } catch {
    // Not ours: a proxy's page, say. The status has to do.
  }
  const pause = response.headers.get("retry-after");
  const advice = pause && /^\d+$/.test(pause) ? ` Try again in ${pause} s.` : "";
  return new ServerError(messageOf(found, response.status) + advice, response.status);
}

function messageOf(body, status) {
  const message = body?.error?.message;
  if (typeof message !== "string" || !message) return `The server answers with status ${status} and does not say why.`;
  const text = message[0].toUpperCase() + message.slice(1);
  return /[.!?…]$/.test(text) ? text : `${text}.`;
}

function parsed(data) {
  try {
    return JSON.parse(data) ?? {};
  } catch {
    throw new ServerError("The server sent something that is no chunk of an answer. Look at its log.");
  }
}
