// What the openai package for Node gets: node client.mjs URL MODEL, JSON on stdout.
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Why is the sky blue?" }];
const asked = { model, messages, temperature: 0, max_tokens: 12 };

const models = [];
for await (const each of client.models.list()) models.push(each.id);

const whole = await client.chat.completions.create(asked);
const { message } = whole.choices[0];
let streamed = "", last;
const usage = { stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create({ ...asked, ...usage, stream: true })) {
  streamed += chunk.choices[0]?.delta.content ?? "";
  last = chunk;
}
const again = [...messages, message, { role: "user", content: "Really?" }];
const next = await client.chat.completions.create({ ...asked, messages: again });
const completion = await client.completions.create({ model, prompt: "The sky is", temperature: 0, max_tokens: 12 });
const failure = await client.chat.completions.create({ ...asked, model: "gpt-4o" }).catch((error) => error);
for await (const chunk of await client.chat.completions.create({ ...asked, max_tokens: 500, stream: true })) break;

console.log(JSON.stringify({
  models,
  whole: message.content,
  streamed,
  usage: [last.usage.prompt_tokens, last.usage.completion_tokens],
  next: next.choices[0].message.content,
  completion: completion.choices[0].text,
  failure: failure.status,
}));
