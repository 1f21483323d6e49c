"""The introduction at the top of the page: what is compared, as a diagram, and what the trunk server can read."""

from html import escape

from splitlearn.arms.model import Model

PURPOSE = (
    "One prompt, two ways. Full runs the whole model in one process. Split keeps both ends on the client and the "
    "layers between on a server: for devices that cannot hold the model. "
    "The tokens are the same; here you see what it costs."
)
TO_TAB = """
element.addEventListener('click', event => {
  const button = event.target.closest('[data-tab]');
  if (button) document.getElementById(`${button.dataset.tab}-button`)?.click();
});
"""


def picture(model: Model | None, read: tuple[float, int] | None = None) -> str:
    """A diagram of full and split with their layers, and what the server can `read`: a share of the tokens of so many
    prompts. It has no numbers before the model is read."""
    plan = model.plan if model else None
    bottom = f"layers 0 to {plan.start - 1}" if plan and plan.start else "no layers" if plan else "first layers"
    trunk = f"layers {plan.start} to {plan.end - 1}" if plan else "layers between"
    top = f"layers {plan.end} to {plan.n_layers - 1}" if plan and plan.end < plan.n_layers else "last layers"
    top = "no layers" if plan and plan.end == plan.n_layers else top
    whole = f"all {plan.n_layers} layers" if plan else "all layers"
    return (
        f'<p class="sl-purpose">{escape(PURPOSE)}</p>{_privacy(read)}'
        '<div class="sl-ways" role="img" aria-label="Full: '
        f"{whole} in one process. Split: {bottom} on the client, {trunk} on the trunk server, {top} on the client."
        '"><div class="sl-way sl-way-full"><b>Full</b><span class="sl-box">embeddings, '
        f"{whole}, LM head</span></div>"
        '<div class="sl-way sl-way-split"><b>Split</b>'
        f'<span class="sl-box">client: embeddings, {bottom}</span><i>gRPC</i>'
        f'<span class="sl-box sl-far">trunk server: {trunk}, KV cache</span><i>gRPC</i>'
        f'<span class="sl-box">client: {top}, LM head</span></div></div>'
    )


def _privacy(read: tuple[float, int] | None) -> str:
    """One sentence on what the trunk server can read, with the figure that is known for this model and cut."""
    figure = f": at this cut an attack recovers {read[0]:.0%} of the tokens of {read[1]} prompts" if read else ""
    return (
        f'<p class="sl-purpose"><span>Not private: the trunk server can read your text{figure}.</span> '
        '<button type="button" class="sl-link" data-tab="tab-attacks">What the server reads</button></p>'
    )
