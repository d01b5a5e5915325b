// A conversation as React state: `const { messages, status, error, send, stop, retry } = useStream({ url, model })`.
// Chunks add to a string; the browser's next frame shows what has come, so that 200 tokens a second are 60 renders, not 200.
// The one rule: nothing of a reply is shown as whole that is not: it is stopped, or failed and can be tried again.
import { useCallback, useEffect, useRef, useState } from "react";
import { chat } from "../fetch-sse/stream.mjs";

export type Message = { role: "user" | "assistant"; content: string; stopped?: boolean };
/** waiting: asked, nothing here yet. streaming: the text grows. failed: `error` says why; `retry` asks again. */
export type Status = "ready" | "waiting" | "streaming" | "failed";
/** url: of `/v1/chat/completions`, or of a route of your own that passes it through. apiKey: only one made for browsers. */
export type Options = { url: string; model: string; apiKey?: string };

export function useStream({ url, model, apiKey }: Options) {
  const [messages, setMessages] = useState<Message[]>([]);
  const [status, setStatus] = useState<Status>("ready");
  const [error, setError] = useState<Error | null>(null);
  const running = useRef<AbortController | null>(null);

  const run = useCallback(
    async (asked: Message[]) => {
      running.current?.abort();
      const controller = (running.current = new AbortController());
      const { signal } = controller;
      const body = { model, messages: asked.map(({ role, content }) => ({ role, content })) };
      let [text, frame] = ["", 0];
      const show = (stopped?: boolean) => {
        frame = 0;
        setMessages([...asked, { role: "assistant", content: text, ...(stopped && { stopped }) }]);
      };
      setMessages(asked);
      setStatus("waiting");
      setError(null);
      try {
        for await (const chunk of chat(url, body, { signal, ...(apiKey && { key: apiKey }) })) {
          text += chunk.choices[0]?.delta.content ?? "";
          if (!text || frame) continue;
          frame = requestAnimationFrame(() => {
            setStatus("streaming");
            show();
          });
        }
        cancelAnimationFrame(frame); // no frame comes while the page is in the background
        show();
        setStatus("ready");
      } catch (error) {
        cancelAnimationFrame(frame);
        if (running.current !== controller) return; // another question has taken its place
        if (text || signal.aborted) show(signal.aborted);
        setStatus(signal.aborted ? "ready" : "failed");
        if (!signal.aborted) setError(error as Error);
      }
    },
    [url, model, apiKey],
  );

  useEffect(() => () => running.current?.abort(), []);

  const send = (content: string) => run([...messages, { role: "user", content }]);
  const stop = () => running.current?.abort();
  // What came of the failed reply is dropped: the next one begins anew.
  const retry = () => run(messages.at(-1)?.role === "assistant" ? messages.slice(0, -1) : messages);
  return { messages, status, error, send, stop, retry };
}
