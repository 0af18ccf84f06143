// The official JavaScript client against a gateway: node openai_client.mjs URL KEY. Prints what it saw as JSON.
import OpenAI from "openai";

const [url, key] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
const messages = [{ role: "user", content: "hello" }];
const seen = {};

async function refused(work) {
  try {
    await work();
    return "answered";
  } catch (error) {
    return { kind: error.constructor.name, status: error.status, code: error.code, param: error.param };
  }
}

const { data, response } = await client.chat.completions.create({ model: "demo", messages }).withResponse();
seen.chat = {
  model: data.model,
  text: data.choices[0].message.content,
  usage: data.usage,
  version: response.headers.get("x-tunesmith-version"),
  id: data.id === `chatcmpl-${response.headers.get("x-request-id")}`,
};

seen.stream = { text: "", finish: null, usage: null, models: new Set() };
const stream = await client.chat.completions.create({
  model: "demo", messages, stream: true, stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  seen.stream.text += chunk.choices[0]?.delta?.content ?? "";
  seen.stream.finish = chunk.choices[0]?.finish_reason ?? seen.stream.finish;
  seen.stream.usage = chunk.usage ?? seen.stream.usage;
  seen.stream.models.add(chunk.model);
}
seen.stream.models = [...seen.stream.models];

const runner = client.chat.completions.stream({ model: "demo", messages });
seen.helper = await runner.finalContent();
seen.completion = (await client.completions.create({ model: "demo:2", prompt: "hello" })).choices[0].text;
seen.models = (await client.models.list()).data.map((model) => model.id);
seen.unknown = await refused(() => client.chat.completions.create({ model: "nobody", messages }));
seen.wrong = await refused(() => client.chat.completions.create({ model: "demo", messages, n: 1000 }));
seen.full = await refused(() => client.chat.completions.create({ model: "demo", messages: [{ role: "user", content: "full" }] }));
seen.failed = await refused(() => client.chat.completions.create({ model: "demo", messages: [{ role: "user", content: "fail" }] }));
const stranger = new OpenAI({ baseURL: `${url}/v1`, apiKey: "ts_no_key", maxRetries: 0 });
seen.stranger = await refused(() => stranger.models.list());

const slow = await client.chat.completions.create({
  model: "demo", messages: [{ role: "user", content: "slow" }], stream: true,
});
for await (const _ of slow) break; // goes away in the middle
console.log(JSON.stringify(seen));
