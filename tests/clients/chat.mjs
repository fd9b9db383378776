// Ten chats through the unmodified npm `ai` package, whose history holds the reasoning of an earlier answer.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const provider = createOpenAICompatible({
  name: "helixflow", baseURL: process.env.BASE_URL, apiKey: "demo-key", includeUsage: true,
});
const options = {
  model: provider("gpt-4"),
  maxRetries: 0,
  messages: [
    { role: "user", content: "Hello" },
    { role: "assistant", content: [{ type: "reasoning", text: "They greet me." }, { type: "text", text: "Hi!" }] },
    { role: "user", content: [{ type: "text", text: "How are you?" }] },
  ],
};

for (let number = 0; number < 10; number++) {
  let text = "";
  if (number % 2 === 0) {
    ({ text } = await generateText(options));
  } else {
    const failed = [];
    const result = streamText({ ...options, onError: ({ error }) => failed.push(error) });
    for await (const piece of result.textStream) text += piece;
    if (failed.length) throw failed[0];
  }
  if (!text) throw new Error(`request ${number} has no text`);
}
console.log(10);
