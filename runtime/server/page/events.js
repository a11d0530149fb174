// Server-sent events out of the bytes of a response, wherever these are cut: inside a character, a line or an event.
// The form: https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation

/** Takes text piece by piece, and gives back the data of the events that are complete. */
export class EventReader {
  #line = "";
  #data = [];
  #skipsLineFeed = false;

  /**
   * Take the next text, and return the data of all events that end in it.
   * @param {string} text
   * @returns {string[]}
   */
  push(text) {
    const found = [];
    let start = 0;
    if (this.#skipsLineFeed && text.length) {
      start = text[0] === "\n" ? 1 : 0;
      this.#skipsLineFeed = false;
    }
    const ends = /\r\n|\n|\r/g;
    ends.lastIndex = start;
    for (let end = ends.exec(text); end; end = ends.exec(text)) {
      this.#endLine(this.#line + text.slice(start, end.index), found);
      this.#line = "";
      start = ends.lastIndex;
      this.#skipsLineFeed = end[0] === "\r" && start === text.length;
    }
    this.#line += text.slice(start);
    return found;
  }

  #endLine(line, found) {
    if (line === "") {
      if (this.#data.length) found.push(this.#data.join("\n"));
      this.#data = [];
      return;
    }
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    if (name !== "data") return; // comments, ids and names of events say nothing here
    const value = colon < 0 ? "" : line.slice(colon + 1);
    this.#data.push(value.startsWith(" ") ? value.slice(1) : value);
  }
}

/**
 * Yield the data of the events of a body as they come; an event that is cut off at the end is none.
 * @param {ReadableStream<Uint8Array>} body
 */
export async function* eventsOf(body) {
  const decoder = new TextDecoder(); // keeps the bytes of a character that is not complete; takes off a byte order mark
  const events = new EventReader();
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      yield* events.push(done ? decoder.decode() : decoder.decode(value, { stream: true }));
      if (done) return;
    }
  } finally {
    // The server learns that nobody reads on.
    reader.cancel().catch(() => {});
  }
}
