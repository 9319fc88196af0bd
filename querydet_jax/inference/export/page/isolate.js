// A service worker. Browsers give several threads only to pages that come with the two headers below, which plain web
// servers do not send: it adds them to what the server answers.

const OURS = 'name="generator" content="querydet_jax page"'; // in index.html

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => event.respondWith(answer(event.request)));

async function answer(request) {
  const response = await fetch(request);
  if (!response.ok) return response;
  // Another site may be at this address by now, as happens on localhost: it is left alone from here on.
  if (request.mode === "navigate" && !(await response.clone().text()).includes(OURS)) {
    await self.registration.unregister();
    return response;
  }
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}
