// The page: `?model=` and `?url=` choose whom it asks; as it stands the route of examples/next-route, which asks the gateway.
import { StrictMode } from "react";
import { createRoot } from "react-dom/client";
import { Chat } from "./Chat.tsx";

const asked = new URLSearchParams(location.search);
const apiKey = asked.get("key");
createRoot(document.getElementById("root")!).render(
  <StrictMode>
    <Chat url={asked.get("url") ?? "/api/chat"} model={asked.get("model") ?? "demo/echo"} {...(apiKey && { apiKey })} />
  </StrictMode>,
);
