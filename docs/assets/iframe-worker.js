/* A page that was opened as a file may not start a worker, so its search runs in a hidden frame.
   Pages that a server sends are left alone. */
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      const inside = frame.contentWindow
      const scripts = new Map()
      // What the script of a worker may call.
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      inside.importScripts = (...urls) => Promise.all(urls.map(load))
      function load(source) {
        if (!scripts.has(source)) {
          scripts.set(source, new Promise(done => {
            const script = inside.document.createElement("script")
            script.src = new URL(source, location.href)
            script.onload = done
            inside.document.body.appendChild(script)
          }))
        }
        return scripts.get(source)
      }
      load(url).then(() => {
        this.inside = inside
        this.waiting.splice(0).forEach(data => this.postMessage(data))
      })
    }
    postMessage(data) {
      if (this.inside) this.inside.dispatchEvent(new MessageEvent("message", { data }))
      else this.waiting.push(data)
    }
    terminate() {}
  }
}
