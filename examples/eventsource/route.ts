// Begins a stream in the background for a page, and tells it the URL at which its EventSource can read: docs/resume.md.
// The one rule: the key stays here; the page's URL has a token that opens this one stream, to read only.
const gateway = process.env.GATEWAY ?? "http://127.0.0.1:8080/v1";

export async function POST(request: Request): Promise<Response> {
  const { model, messages } = (await request.json()) as { model?: string; messages: unknown };
  const answer = await fetch(`${gateway}/chat/completions`, {
    method: "POST",
    headers: { "Content-Type": "application/json", Authorization: `Bearer ${process.env.GATEWAY_KEY ?? "any"}` },
    body: JSON.stringify({ model: model ?? "demo/slow", messages, background: true }),
  });
  const told = await answer.json();
  if (answer.ok && answer.status !== 202) return failure("The gateway has no middleware `resume`.");
  if (!answer.ok) return Response.json(told, { status: answer.status });
  // Where browsers reach the gateway, if that is not where this server does.
  return Response.json({ url: new URL(told.url, process.env.GATEWAY_PUBLIC ?? gateway).href });
}

function failure(message: string): Response {
  return Response.json({ error: { message, type: "api_error", param: null, code: null } }, { status: 502 });
}
