// The page: `?model=` chooses the model that the route asks for.
import { createRoot } from "react-dom/client";
import { Chat } from "./Chat.tsx";

const model = new URLSearchParams(location.search).get("model") ?? "demo/echo";
createRoot(document.getElementById("root")!).render(<Chat api="/api/ai-sdk" model={model} />);
