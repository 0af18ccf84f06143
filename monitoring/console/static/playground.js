// Asks two versions the same through the gateway's own API, with this session, and shows their answers as they come.
"use strict";

const form = document.getElementById("ask");
const milliseconds = (value) => (value < 999.5 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(1)} s`);

async function ask(place, model, messages, settings) {
  const pre = place.querySelector("pre");
  const figures = place.querySelector(".figures");
  const started = performance.now();
  let first = null, usage = null, served = model, finish = null;
  place.querySelector(".served").textContent = model;
  pre.textContent = "";
  pre.classList.remove("quiet");
  figures.replaceChildren();
  place.classList.add("busy");
  place.classList.remove("bad");
  try {
    const answer = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model, messages, stream: true, stream_options: { include_usage: true }, ...settings }),
    });
    if (!answer.ok) {
      const body = await answer.json().catch(() => null);
      const error = body?.error;
      throw new Error(error ? [error.message, error.hint].filter(Boolean).join(" ") : `The gateway answered ${answer.status}.`);
    }
    served = answer.headers.get("x-tunesmith-version") || served;
    place.querySelector(".served").textContent = served;
    const request = answer.headers.get("x-request-id");
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      rest += value;
      const lines = rest.split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") continue;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        const choice = chunk.choices?.[0];
        if (choice?.delta?.content) {
          first ??= performance.now();
          pre.append(choice.delta.content);
        }
        finish = choice?.finish_reason ?? finish;
        usage = chunk.usage ?? usage;
      }
    }
    const total = performance.now() - started;
    const facts = [["Time", milliseconds(total)]];
    if (first !== null) facts.push(["First token", milliseconds(first - started)]);
    if (usage) {
      facts.push(["Tokens", `${usage.prompt_tokens} in, ${usage.completion_tokens} out`]);
      if (total > 0) facts.push(["Rate", `${(usage.completion_tokens / (total / 1000)).toFixed(1)} tok/s`]);
    }
    if (finish) facts.push(["Ended by", finish]);
    for (const [name, value] of facts) {
      const span = document.createElement("span");
      span.textContent = `${name} ${value}`;
      figures.append(span);
    }
    if (request) {
      const link = document.createElement("a");
      link.href = `/requests/${encodeURIComponent(request)}`;
      link.textContent = "The request";
      figures.append(link);
    }
    if (!pre.textContent) pre.textContent = "(an empty answer)";
  } catch (error) {
    place.classList.add("bad");
    pre.textContent = error.message;
  } finally {
    place.classList.remove("busy");
  }
}

form?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const data = new FormData(form);
  const messages = [];
  const system = String(data.get("system") || "").trim();
  if (system) messages.push({ role: "system", content: system });
  messages.push({ role: "user", content: String(data.get("prompt")) });
  const settings = { temperature: Number(data.get("temperature")) };
  const most = Number(data.get("max_tokens"));
  if (most > 0) settings.max_tokens = most;
  const asked = ["left", "right"].filter((side) => data.get(side)).map((side) =>
    ask(document.getElementById(side), String(data.get(side)), messages, settings));
  await Promise.all(asked);
  form.querySelectorAll("button").forEach((button) => { button.disabled = false; });
});
form?.querySelector("textarea[name=prompt]").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
