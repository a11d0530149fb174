// An answer as it grows out of the chunks of a stream, and the figures that stand under it.

/** One answer. */
export class Answer {
  /** @param {() => number} now Milliseconds of a clock that never goes back. */
  constructor(now = () => performance.now()) {
    this.text = "";
    this.reasoning = "";
    this.finishReason = null;
    this.usage = null;
    this.timings = null;
    this.boxes = [];
    this.points = [];
    this.#now = now;
    this.#began = now();
  }

  #now;
  #began;
  #first = null;
  #last = null;

  /**
   * Take a chunk, and return the text and the thoughts that are new.
   * @returns {{text: string, reasoning: string}}
   */
  push(chunk) {
    const choice = chunk.choices?.find((each) => (each.index ?? 0) === 0);
    const text = textOf(choice?.delta?.content);
    const reasoning = textOf(choice?.delta?.reasoning_content);
    if (text || reasoning) {
      this.#last = this.#now();
      this.#first ??= this.#last;
    }
    this.text += text;
    this.reasoning += reasoning;
    this.finishReason = choice?.finish_reason ?? this.finishReason;
    this.usage = chunk.usage ?? this.usage;
    this.timings = chunk.timings ?? this.timings;
    this.boxes = chunk.boxes ?? this.boxes;
    this.points = chunk.points ?? this.points;
    return { text, reasoning };
  }

  /**
   * Return the figures: the server's where it sent some, else what was measured here.
   * @returns {[string, string][]} Names and values.
   */
  figures() {
    const timings = this.timings ?? {};
    const usage = this.usage ?? {};
    const newTokens = timings.new_tokens ?? usage.completion_tokens;
    const ttft = timings.ttft_s ?? (this.#first === null ? undefined : (this.#first - this.#began) / 1000);
    const found = [
      ["Time to first token", ttft === undefined ? "" : seconds(ttft)],
      ["Speed", this.#speed(timings, newTokens)],
      ["Answer", tokens(newTokens)],
      ["Prompt", tokens(timings.prompt_tokens ?? usage.prompt_tokens)],
      ["Visual", tokens(timings.visual_tokens)],
      ["From cache", cached(timings.cached_tokens ?? usage.prompt_tokens_details?.cached_tokens, timings.cached_images)],
      ["Ended", REASONS[this.finishReason] ?? this.finishReason ?? ""],
    ];
    return found.filter(([, value]) => value !== "");
  }

  #speed(timings, newTokens) {
    let rate = timings.tokens_per_s;
    if (rate === undefined && newTokens > 1 && this.#last > this.#first) {
      rate = ((newTokens - 1) * 1000) / (this.#last - this.#first);
    }
    return rate ? `${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s` : "";
  }
}

const REASONS = {
  stop: "complete",
  length: "limit of tokens reached",
  stopped: "stopped by you",
  failed: "broken off",
  tool_calls: "calls a function",
};

function textOf(value) {
  return typeof value === "string" ? value : "";
}

function seconds(value) {
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

function tokens(number) {
  return number === undefined ? "" : `${number.toLocaleString("en")} ${number === 1 ? "token" : "tokens"}`;
}

function cached(numTokens, numImages) {
  if (numTokens === undefined) return "";
  const images = numImages === undefined ? "" : `, ${numImages} ${numImages === 1 ? "image" : "images"}`;
  return tokens(numTokens) + images;
}
