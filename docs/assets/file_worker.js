// The search runs in a Worker, which browsers refuse to pages opened from a folder: there it runs in a hidden frame.
// The theme would load such a script from another host.
if (location.protocol === "file:")
  window.Worker = window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      this.early = [];
      this.frame = document.body.appendChild(document.createElement("iframe"));
      this.frame.hidden = true;
      const inside = this.frame.contentDocument;
      inside.open();
      this.frame.contentWindow.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.frame.contentWindow.importScripts = () => Promise.resolve();
      this.frame.onload = () => {
        const early = this.early;
        this.early = null;
        early.forEach((data) => this.postMessage(data));
      };
      inside.write(`<!doctype html><body><script src="${url}"></script>`);
      inside.close();
    }
    postMessage(data) {
      if (this.early) this.early.push(data);
      else this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
    }
    terminate() {
      this.frame.remove();
    }
  };
