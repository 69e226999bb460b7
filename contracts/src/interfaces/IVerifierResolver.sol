// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {IJobs} from "./IJobs.sol";
import {IResolver} from "./IResolver.sol";

/// @title A resolver that believes a proof system and nobody else
/// @notice Anyone may bring a proof. One that the result is right rejects the challenge, one that it is wrong accepts it, and
/// the first one that shows anything is final. Without a proof it stays silent, which is a draw in the end.
/// Warning: a proof can be copied out of the pool of waiting transactions, and the fee goes to whose transaction is first.
interface IVerifierResolver is IResolver {
    /// @param begun Whether Disputes has brought it.
    /// @param prover Whose proof decided; zero before.
    struct Case {
        bytes32 specHash;
        bytes32 resultHash;
        address prover;
        bool begun;
        bool paid;
        Outcome outcome;
    }

    error VerifierResolver_NotAContract(address account);
    error VerifierResolver_NotDisputes(address caller);
    error VerifierResolver_Known(bytes32 jobId);
    error VerifierResolver_Unknown(bytes32 jobId);
    error VerifierResolver_Proven(bytes32 jobId);
    error VerifierResolver_ShowsNothing(bytes32 jobId);
    error VerifierResolver_NotProver(bytes32 jobId, address caller);
    error VerifierResolver_NoFee(bytes32 jobId);

    event Begun(bytes32 indexed jobId, bytes32 specHash, bytes32 resultHash, bytes32 evidence);
    event Proven(bytes32 indexed jobId, address indexed prover, Outcome outcome);
    event FeeClaimed(bytes32 indexed jobId, address indexed prover, address indexed to, uint256 amount);

    /// @notice Decides the case by a proof. Anyone may call.
    function prove(bytes32 jobId, bytes calldata proof) external;

    /// @notice After the dispute is resolved: pays its fee to the order of the prover, out of the vault.
    function claimFee(IJobs.Quote calldata quote, address to) external returns (uint256 amount);

    function caseOf(bytes32 jobId) external view returns (Case memory);
}
