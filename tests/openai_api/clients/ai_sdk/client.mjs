// What the AI SDK gets by @ai-sdk/openai-compatible: node client.mjs URL MODEL, JSON on stdout.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const [baseURL, name] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: "splitlearn", baseURL, includeUsage: true });
const model = provider(name);
const messages = [{ role: "user", content: "Why is the sky blue?" }];
const asked = { model, messages, temperature: 0, maxOutputTokens: 12, maxRetries: 0 };

const whole = await generateText(asked);
const stream = streamText(asked);
let streamed = "";
for await (const text of stream.textStream) streamed += text;
const usage = await stream.usage;
const again = [...messages, ...whole.response.messages, { role: "user", content: "Really?" }];
const next = await generateText({ ...asked, messages: again });
const failure = await generateText({ ...asked, model: provider("gpt-4o") }).catch((error) => error);

console.log(JSON.stringify({
  whole: whole.text,
  streamed,
  usage: [usage.inputTokens, usage.outputTokens],
  next: next.text,
  failure: failure.statusCode,
}));
