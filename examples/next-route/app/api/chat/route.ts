// A route handler that passes the gateway's stream through: app/api/chat/route.ts of a Next.js app, or any server of Requests.
// The browser never sees the gateway's key, and asks for no more than this handler lets through.
// The one rule: bytes go through as they come, so that the stream ends for the page exactly as it ended for the gateway.
export const runtime = "edge";

const PASSED = ["content-type", "cache-control", "x-accel-buffering", "x-request-id", "retry-after", "x-should-retry"];

export async function POST(request: Request): Promise<Response> {
  let asked: { model?: unknown; messages?: unknown };
  try {
    asked = await request.json();
  } catch {
    return failure(400, "invalid_json", "The body is not JSON.");
  }
  try {
    const upstream = await fetch(`${process.env.GATEWAY ?? "http://127.0.0.1:8080/v1"}/chat/completions`, {
      method: "POST",
      headers: { "Content-Type": "application/json", Authorization: `Bearer ${process.env.GATEWAY_KEY ?? "any"}` },
      body: JSON.stringify({
        model: asked.model ?? "demo/echo",
        messages: asked.messages,
        stream: true,
        stream_options: { include_usage: true },
      }),
      signal: request.signal, // the page has gone, or somebody pressed stop
    });
    const headers = new Headers([...upstream.headers].filter(([name]) => PASSED.includes(name)));
    return new Response(upstream.body, { status: upstream.status, headers });
  } catch (error) {
    if (request.signal.aborted) throw error;
    return failure(502, "gateway_unreachable", "The gateway could not be reached.");
  }
}

function failure(status: number, code: string, message: string): Response {
  return Response.json({ error: { message, type: "api_error", param: null, code } }, { status });
}
