// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IDisputes} from "./interfaces/IDisputes.sol";
import {IJobs} from "./interfaces/IJobs.sol";
import {IProofVerifier, IResolver} from "./interfaces/IResolver.sol";
import {IVault} from "./interfaces/IVault.sol";
import {IVerifierResolver} from "./interfaces/IVerifierResolver.sol";

contract VerifierResolver is IVerifierResolver {
    IVault public immutable vault;
    IJobs public immutable jobs;
    IDisputes public immutable disputes;
    IProofVerifier public immutable verifier;

    mapping(bytes32 jobId => Case) private _cases;

    constructor(IVault vault_, IJobs jobs_, IDisputes disputes_, IProofVerifier verifier_) {
        if (address(vault_).code.length == 0) revert VerifierResolver_NotAContract(address(vault_));
        if (address(jobs_).code.length == 0) revert VerifierResolver_NotAContract(address(jobs_));
        if (address(disputes_).code.length == 0) revert VerifierResolver_NotAContract(address(disputes_));
        if (address(verifier_).code.length == 0) revert VerifierResolver_NotAContract(address(verifier_));
        vault = vault_;
        jobs = jobs_;
        disputes = disputes_;
        verifier = verifier_;
    }

    /// @inheritdoc IResolver
    function begin(bytes32 jobId, bytes32 specHash, bytes32 resultHash, bytes32 evidence) external {
        if (msg.sender != address(disputes)) revert VerifierResolver_NotDisputes(msg.sender);
        if (_cases[jobId].begun) revert VerifierResolver_Known(jobId);

        _cases[jobId] = Case(specHash, resultHash, address(0), true, false, Outcome.None);

        emit Begun(jobId, specHash, resultHash, evidence);
    }

    /// @inheritdoc IVerifierResolver
    function prove(bytes32 jobId, bytes calldata proof) external {
        Case storage record = _cases[jobId];
        if (!record.begun) revert VerifierResolver_Unknown(jobId);
        if (record.outcome != Outcome.None) revert VerifierResolver_Proven(jobId);
        IProofVerifier.Verdict verdict = verifier.verify(record.specHash, record.resultHash, proof);
        if (verdict == IProofVerifier.Verdict.Invalid) revert VerifierResolver_ShowsNothing(jobId);

        Outcome found = verdict == IProofVerifier.Verdict.Wrong ? Outcome.Accept : Outcome.Reject;
        record.outcome = found;
        record.prover = msg.sender;

        emit Proven(jobId, msg.sender, found);
    }

    /// @inheritdoc IVerifierResolver
    function claimFee(IJobs.Quote calldata quote, address to) external returns (uint256 amount) {
        bytes32 jobId = jobs.jobIdOf(quote);
        Case storage record = _cases[jobId];
        if (record.prover != msg.sender) revert VerifierResolver_NotProver(jobId, msg.sender);
        amount = disputes.disputeOf(jobId).fee;
        if (amount == 0 || record.paid) revert VerifierResolver_NoFee(jobId);

        record.paid = true;

        emit FeeClaimed(jobId, msg.sender, to, amount);

        vault.withdraw(quote.token, amount, to);
    }

    /// @inheritdoc IResolver
    function outcome(bytes32 jobId) external view returns (Outcome) {
        return _cases[jobId].outcome;
    }

    /// @inheritdoc IVerifierResolver
    function caseOf(bytes32 jobId) external view returns (Case memory) {
        return _cases[jobId];
    }
}
