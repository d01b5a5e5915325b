// The AI SDK's `useChat` against route.ts: its messages have parts, its own stop, status and regenerate do the rest.
import { useChat } from "@ai-sdk/react";
import { DefaultChatTransport, type UIMessage } from "ai";
import { useState } from "react";

type Told = UIMessage<{ tokens?: number }>;

export function Chat({ api, model }: { api: string; model: string }) {
  const [transport] = useState(() => new DefaultChatTransport<Told>({ api, body: { model } }));
  const { messages, sendMessage, status, stop, error, regenerate } = useChat<Told>({ transport, experimental_throttle: 50 });
  const [draft, setDraft] = useState("");
  const busy = status === "submitted" || status === "streaming";

  return (
    <main>
      <h1>useChat</h1>
      <div role="log" aria-live="polite" aria-busy={busy} aria-label="Conversation">
        {messages.map((message) => (
          <article key={message.id} aria-label={message.role === "user" ? "You" : "Assistant"}>
            {message.parts.map((part, index) => part.type === "text" && <p key={index}>{part.text}</p>)}
            {message.metadata?.tokens !== undefined && <small>{message.metadata.tokens} tokens</small>}
          </article>
        ))}
        {status === "submitted" && <p role="status">…</p>}
        {error && (
          <p role="alert">
            {error.message} <button onClick={() => void regenerate()}>Try again</button>
          </p>
        )}
      </div>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          if (busy || !draft.trim()) return;
          void sendMessage({ text: draft });
          setDraft("");
        }}
      >
        <label>
          Message <input value={draft} onChange={(event) => setDraft(event.target.value)} autoFocus />
        </label>
        {busy ? (
          <button type="button" onClick={() => void stop()}>
            Stop
          </button>
        ) : (
          <button>Send</button>
        )}
      </form>
    </main>
  );
}
