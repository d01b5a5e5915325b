// A chat around `useStream`: plain text, a stop button, a typing indicator, an error with retry; without mouse or screen, too.
// The one rule: the log is `aria-busy` while a reply grows, so that a screen reader reads it once, whole, and not word by word.
import { useEffect, useRef, useState, type FormEvent, type KeyboardEvent } from "react";
import { useStream, type Message, type Options } from "./useStream.ts";
import "./chat.css";

export function Chat(options: Options) {
  const { messages, status, error, send, stop, retry } = useStream(options);
  const [draft, setDraft] = useState("");
  const field = useRef<HTMLTextAreaElement>(null);
  const busy = status === "waiting" || status === "streaming";
  const log = useBottom(messages, status);

  const submit = (event?: FormEvent) => {
    event?.preventDefault();
    if (busy || !draft.trim()) return;
    void send(draft.trim());
    setDraft("");
  };
  const onKeyDown = (event: KeyboardEvent) => {
    // Enter that ends the composition of a character (Japanese, Chinese) is not the Enter that sends.
    if (event.key !== "Enter" || event.shiftKey || event.nativeEvent.isComposing) return;
    event.preventDefault();
    submit();
  };
  // The button that was pressed goes away; the focus must not go with it.
  const thenFocus = (act: () => void) => () => {
    act();
    field.current?.focus();
  };

  return (
    <section className="chat" aria-label="Chat">
      <header>
        <h1>Penstock</h1>
        <code>{options.model}</code>
      </header>
      <div className="log" role="log" aria-live="polite" aria-busy={busy} aria-label="Conversation" tabIndex={0} ref={log}>
        {messages.length === 0 && <p className="empty">Ask something; the answer comes word by word.</p>}
        {messages.map((message, index) => (
          <Bubble key={index} message={message} growing={status === "streaming" && index === messages.length - 1} />
        ))}
        {status === "waiting" && <Typing />}
        {error && (
          <div className="error" role="alert">
            <p>{error.message}</p>
            <button type="button" onClick={thenFocus(() => void retry())}>
              Try again
            </button>
          </div>
        )}
      </div>
      <form onSubmit={submit}>
        <label htmlFor="message">Message</label>
        <textarea
          id="message"
          ref={field}
          rows={1}
          value={draft}
          placeholder="Message"
          autoFocus
          onChange={(event) => setDraft(event.target.value)}
          onKeyDown={onKeyDown}
        />
        {busy ? (
          <button type="button" className="stop" onClick={thenFocus(stop)}>
            Stop
          </button>
        ) : (
          <button type="submit" disabled={!draft.trim()}>
            Send
          </button>
        )}
      </form>
    </section>
  );
}

function Bubble({ message, growing }: { message: Message; growing: boolean }) {
  return (
    <article className={`${message.role}${growing ? " growing" : ""}`} aria-label={message.role === "user" ? "You" : "Assistant"}>
      <p>{message.content}</p>
      {message.stopped && <small>stopped</small>}
    </article>
  );
}

function Typing() {
  return (
    <div className="typing" role="status">
      <span className="unseen">The assistant is typing</span>
      <i /> <i /> <i />
    </div>
  );
}

/** Keeps the end in view, unless the reader has scrolled away from it. */
function useBottom(...changes: unknown[]) {
  const log = useRef<HTMLDivElement>(null);
  const held = useRef(true);
  useEffect(() => {
    const element = log.current;
    if (!element) return;
    const look = () => (held.current = element.scrollHeight - element.scrollTop - element.clientHeight < 40);
    element.addEventListener("scroll", look, { passive: true });
    return () => element.removeEventListener("scroll", look);
  }, []);
  useEffect(() => {
    if (held.current) log.current?.scrollTo({ top: log.current.scrollHeight });
  }, changes);
  return log;
}
