// The AI SDK's route for `useChat`, behind which stands the gateway instead of a provider's package.
// The one rule: the gateway retries and falls back, so the SDK does not; and what the page stops, stops everywhere.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, convertToModelMessages, streamText, type UIMessage } from "ai";

const penstock = createOpenAICompatible({
  name: "penstock",
  baseURL: process.env.GATEWAY ?? "http://127.0.0.1:8080/v1",
  apiKey: process.env.GATEWAY_KEY ?? "any",
  includeUsage: true,
});

export async function POST(request: Request): Promise<Response> {
  const { messages, model } = (await request.json()) as { messages: UIMessage[]; model?: string };
  const result = streamText({
    model: penstock(model ?? "demo/echo"),
    messages: await convertToModelMessages(messages),
    maxRetries: 0,
    abortSignal: request.signal,
    onError: () => {}, // the page is told below
  });
  return result.toUIMessageStreamResponse({
    messageMetadata: ({ part }) => (part.type === "finish" ? { tokens: part.totalUsage.outputTokens } : undefined),
    onError: told,
  });
}

// The gateway's errors are written for users, without keys and addresses; what else goes wrong in here is nobody's business.
// They come as APICallError before the first word, and as the plain object of the error chunk behind it.
function told(error: unknown): string {
  const written = APICallError.isInstance(error) || !(error instanceof Error);
  const message = (error as { message?: unknown } | null)?.message;
  return written && typeof message === "string" ? message : "The stream broke off.";
}
