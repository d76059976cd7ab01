// The board as an anywidget: numbers come from Python, clicks go there. explorer_board.js precedes this code.

/** Binary values arrive as DataView. */
const bytes = (value) => (value ? new Uint8Array(value.buffer, value.byteOffset, value.byteLength) : null);

export default {
  render({ model, el }) {
    const root = document.createElement("div");
    el.append(root);
    const tell = (name, value) => { model.set(name, value); model.save_changes(); };
    const board = createBoard(root, {
      // The kernel does not answer if the pixel stays the same; its last answer still holds.
      pixel: (pixel) => { tell("pixel", pixel); show.reading(); },
      decide: (key) => model.send([key, model.get("index")]),
      image: (index) => { if (index >= 0 && index < model.get("images").length) tell("index", index); },
    });
    const lut = bytes(model.get("lut"));
    const show = {
      images: () => board.setImages(model.get("images"), model.get("index")),
      status: () => board.setStatus(model.get("status").text ?? "", model.get("status").kind ?? ""),
      look: () => board.setLook({ opacity: model.get("opacity"), lut }),
      reading: () => {
        // The values of an earlier pixel may arrive while a later one is marked.
        const pixel = model.get("pixel"), reading = model.get("reading");
        board.setPixel(pixel, reading.row === pixel[0] && reading.col === pixel[1] && reading.values ? reading : null);
      },
      view: () => {
        const view = model.get("view"), decoded = { maps: view.maps?.map(bytes) };
        for (const name of ["image", "truth", "fused", "target", "mask"]) decoded[name] = bytes(view[name]);
        if (view.maps) board.setView({ ...view, ...decoded });
        // A review takes any name; it offers those of the classes.
        const offered = root.closest(".smaf-explorer")?.querySelector(".jupyter-widget-tagsinput datalist");
        offered?.replaceChildren(...(view.class_names ?? []).map((name) => new Option(name, name)));
      },
    };
    // Chromium fires no change when Enter is pressed in the field of the chips, so that ipywidgets would not add one.
    const enter = ({ key, target }) => {
      if (key === "Enter" && target.matches(".smaf-explorer .jupyter-widget-taginput")) target.dispatchEvent(new Event("change"));
    };
    document.addEventListener("keyup", enter);
    const heard = { images: ["images", "index"], status: ["status"], look: ["opacity"], reading: ["reading"], view: ["view"] };
    for (const [what, names] of Object.entries(heard)) {
      for (const name of names) model.on(`change:${name}`, show[what]);
      show[what]();
    }
    return () => {
      document.removeEventListener("keyup", enter);
      for (const [what, names] of Object.entries(heard)) names.forEach((name) => model.off(`change:${name}`, show[what]));
    };
  },
};
